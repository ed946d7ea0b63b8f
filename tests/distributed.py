"""Train a small project on several processes.

    python distributed.py STRATEGY PROCESSES FOLDER [HOW LAYER LR GRADIENT]

Every process writes what it saw into the folder: the signs of the latent weights in each forward, inputs and outputs of
the first layer, and its last weights. The first process writes the test metrics.
"""

import sys
from pathlib import Path

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from networks import Project, loader, trainer
from patterns import Centred, SignFunction
from torch import nn
from torch.distributed.tensor import DTensor

from bnnft.ber import Asymmetric, Independent
from bnnft.callbacks import AccuracyOverBER, BitFlipTraining, ToleranceMetrics
from bnnft.nn import BinaryActivation, BinaryLinear
from bnnft.tracing.sharding import whole


class Recording(Project):
    """No batch norm, whose statistics would be those of a process; plain gradient descent, which adds up."""

    def __init__(self, folder, layer, lr):
        torch.manual_seed(0)
        net = nn.Sequential(layer(12, 16), BinaryActivation(), layer(16, 16), BinaryActivation(), nn.Linear(16, 3))
        super().__init__(net, lr)
        self.folder, self.signs, self.outputs = folder, [], []
        self.net[0].register_forward_hook(self._note)

    def _note(self, layer, inputs, output):
        if self.training:
            self.outputs.append((inputs[0].detach().clone(), output.detach().clone()))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def configure_model(self):
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and not isinstance(self.net[0].weight, DTensor):
            from torch.distributed.fsdp import fully_shard

            for layer in (self.net[0], self.net[2], self.net):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        if self.trainer.training:  # not when its loss is asked for in validation
            self.signs.append([whole(self.net[i].weight).sign().to(torch.int8) for i in (0, 2)])
        return super().training_step(batch, batch_idx)

    def on_train_end(self):
        weights = {name: whole(weight).clone() for name, weight in self.named_parameters()}
        torch.save((self.signs, self.outputs, weights), Path(self.folder) / f"rank{self.global_rank}.pt")

    def on_test_end(self):
        if self.trainer.is_global_zero:
            metrics = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
            torch.save(metrics, Path(self.folder) / "metrics.pt")


def main(strategy, processes, folder, how="latent", layer="BinaryLinear", lr="0.1", gradient="straight_through"):
    layers = {"SignFunction": SignFunction, "Centred": Centred}
    kind = layers.get(layer, lambda inputs, outputs: BinaryLinear(inputs, outputs, bias=False))
    if strategy == "fsdp2":
        strategy = ModelParallelStrategy(data_parallel_size=int(processes), tensor_parallel_size=1)
    # errors that read the bits, of which each process holds a part, go with the gradient of two passes
    errors = Asymmetric(0.05, 0.3) if gradient == "average" else Independent(0.2)
    training = BitFlipTraining(errors, how=how, gradient=gradient)
    callbacks = [training, ToleranceMetrics(), AccuracyOverBER([0, 0.1, 0.3], maps=2, error_model=errors)]
    # one batch an epoch: Lightning shuffles the data of distributed training
    run = trainer(folder, callbacks, strategy=strategy, devices=int(processes), max_epochs=6)
    module, data = Recording(folder, kind, float(lr)), loader(48 // int(processes))
    run.fit(module, data, data)
    run.test(module, data, verbose=False)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
