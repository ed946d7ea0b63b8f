"""A Hydra application of one's own that takes error models and callbacks from the groups of bnnft.

    python project.py ber.rate=0.05
    python project.py -m ber=independent,chip seed=0,1

In a notebook, without `output_dir`, which only a run has:

    with hydra.initialize("config", version_base="1.3"):
        config = hydra.compose("project", ["ber=chip", "output_dir=null"])
    accuracies = train(config)
"""

import hydra
import torch
from hydra.core.utils import setup_globals
from hydra.utils import instantiate
from lightning import LightningModule, Trainer, seed_everything
from omegaconf import DictConfig
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bnnft.nn import BinaryActivation, BinaryLinear


class Digits(LightningModule):
    """One binarized hidden layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = nn.Sequential(BinaryLinear(64, width, bias=False), nn.BatchNorm1d(width), BinaryActivation())
        self.last = nn.Linear(width, 10)

    def forward(self, input: Tensor) -> Tensor:
        return self.last(self.hidden(input))

    def training_step(self, batch, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch, batch_idx: int) -> None:
        self.log("test_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=2e-3)


def loaders() -> tuple[DataLoader, DataLoader]:
    """Batches to train and to test with."""
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 8 - 1
    data = TensorDataset(images, torch.tensor(digits.target))
    train, test = torch.utils.data.random_split(data, [1497, 300], torch.Generator().manual_seed(0))
    return DataLoader(train, 64, shuffle=True), DataLoader(test, 300)


def train(config: DictConfig) -> dict[str, float]:
    """Train under the configured bit errors and test without and with them."""
    seed_everything(config.seed, verbose=False)
    callbacks = [instantiate(entry) for entry in config.callbacks.values()]
    module, (batches, test_batches) = Digits(config.width), loaders()
    trainer = Trainer(
        max_epochs=config.max_epochs,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, batches)
    trainer.test(module, test_batches, verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


@hydra.main(version_base="1.3", config_path="config", config_name="project")
def main(config: DictConfig) -> float:
    """Print and return the accuracy at the tested rates."""
    setup_globals()  # for ${hydra:...}, which --experimental-rerun does not know without
    metrics = train(config)
    print("\n".join(f"{name}: {value:.4f}" for name, value in metrics.items()))
    return metrics["test_acc"]


if __name__ == "__main__":
    main()
