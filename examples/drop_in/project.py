"""A Lightning project that knows nothing of bit errors: binarized layers and a module of its own, the usual CLI.

The callbacks come from ``config.yaml``:

    pip install 'bnnft[cli]'
    python project.py fit --config config.yaml
    python project.py test --config config.yaml --ckpt_path CHECKPOINT
"""

import torch
from lightning import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split


class Sign(torch.autograd.Function):
    """Signs whose gradient passes where the input is at most 1."""

    @staticmethod
    def forward(ctx, input: Tensor) -> Tensor:
        ctx.save_for_backward(input)
        return torch.where(input >= 0, 1.0, -1.0)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (given,) = ctx.saved_tensors
        return gradient * (given.abs() <= 1)


class SignLayer(nn.Linear):
    """A linear map by the signs of its weights, times their mean magnitude."""

    def forward(self, input: Tensor) -> Tensor:
        scale = self.weight.abs().mean(1, keepdim=True).detach()
        return nn.functional.linear(input, Sign.apply(self.weight) * scale)


class SignActivation(nn.Module):
    """Binary neurons."""

    def forward(self, input: Tensor) -> Tensor:
        return Sign.apply(input)


class DigitsModule(LightningModule):
    """Two binarized hidden layers and one of floats."""

    def __init__(self, width: int = 256, lr: float = 2e-3) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(
            *(SignLayer(64, width, bias=False), nn.BatchNorm1d(width), SignActivation()),
            *(SignLayer(width, width, bias=False), nn.BatchNorm1d(width), SignActivation()),
            nn.Linear(width, 10),
        )

    def forward(self, input: Tensor) -> Tensor:
        return self.net(input)

    def training_step(self, batch, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx: int) -> None:
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean(), prog_bar=True)

    def test_step(self, batch, batch_idx: int) -> None:
        self.log("test_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class DigitsData(LightningDataModule):
    """The digits of scikit-learn."""

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        digits = load_digits()
        images = torch.tensor(digits.data, dtype=torch.float32) / 8 - 1
        split = torch.Generator().manual_seed(0)
        parts = random_split(TensorDataset(images, torch.tensor(digits.target)), [1297, 200, 300], split)
        self.train, self.val, self.test = parts

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, self.batch_size)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, self.batch_size)


if __name__ == "__main__":
    LightningCLI(DigitsModule, DigitsData)
