"""Small Lightning projects that several tests train."""

import torch
from lightning import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bnnft.nn import BinaryActivation, BinaryLinear


def small_net(seed=0, inputs=12, width=16, classes=3):
    torch.manual_seed(seed)
    return nn.Sequential(
        BinaryLinear(inputs, width, bias=False),
        nn.BatchNorm1d(width),
        BinaryActivation(),
        BinaryLinear(width, width, bias=False),
        nn.BatchNorm1d(width),
        BinaryActivation(),
        BinaryLinear(width, classes, bias=False),
    )


def small_data(samples=48, inputs=12, classes=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, inputs, generator=generator)
    return TensorDataset(x, (x @ torch.randn(inputs, classes, generator=generator)).argmax(1))


def loader(batch_size=8, shuffle=False, **kwargs):
    return DataLoader(small_data(**kwargs), batch_size=batch_size, shuffle=shuffle)


class Project(LightningModule):
    """A project as others write them: knows nothing of bnnft."""

    def __init__(self, net=None, lr=0.01):
        super().__init__()
        self.net = small_net() if net is None else net
        self.lr = lr

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val/loss", nn.functional.cross_entropy(self(x), y))

    def test_step(self, batch, batch_idx):
        self.validation_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class Manual(Project):
    """The same project with manual optimization."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class SharpnessAware(torch.optim.SGD):
    """Steps from where the gradient is that of a point uphill (Foret et al. 2021): two evaluations a batch."""

    @torch.no_grad()
    def step(self, closure):
        with torch.enable_grad():
            loss = closure()
        weights = [weight for group in self.param_groups for weight in group["params"]]
        uphill = [0.05 * weight.grad.sign() for weight in weights]
        torch._foreach_add_(weights, uphill)
        with torch.enable_grad():
            closure()
        torch._foreach_sub_(weights, uphill)
        super().step()
        return loss


def trainer(tmp_path, callbacks, kind=Trainer, **kwargs):
    """A quiet Trainer on the CPU, of lightning if no other is named."""
    settings = {
        "accelerator": "cpu",
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
    }
    return kind(callbacks=callbacks, **(settings | kwargs))


def state(module):
    """Copies of everything in the state dict."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def equal_states(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
