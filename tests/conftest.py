import os
import signal
import sys

# Several processes run tests side by side: each computes on one thread, and so do the commands that it starts.
os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

import hypothesis
import pytest
import torch
from torch import nn

# the same examples in every run, and no limits on time: machines are slow at times
hypothesis.settings.register_profile("bnnft", deadline=None, derandomize=True)
hypothesis.settings.load_profile("bnnft")
torch.set_num_threads(1)

# a shell lets what it starts in the background ignore it, and some tests are of interrupts
signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests and the commands that they start are no jobs of Slurm, also where it is installed or runs the tests: Lightning
# would remark that `srun` was not used, or refuse to start other processes than those of the job.
os.environ["PYTHONWARNINGS"] = "ignore:The `srun` command is available on your system but is not used"
os.environ["SLURM_JOB_NAME"] = "interactive"


@pytest.fixture
def randomized():
    """Return a function that gives the batch norms of a network random values, gamma of both signs and one zero."""

    def randomize(model, seed=0):
        generator = torch.Generator().manual_seed(seed)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.running_mean.normal_(0, 2, generator=generator)
                module.running_var.uniform_(1, 9, generator=generator)
                nn.init.normal_(module.weight, generator=generator)
                nn.init.normal_(module.bias, generator=generator)
                nn.init.zeros_(module.weight[:1])
            elif hasattr(module, "weight"):
                nn.init.normal_(module.weight, generator=generator)
        return model.eval()

    return randomize


@pytest.fixture(autouse=True)
def uncompiled_again():
    """Let no test run into the limit of graphs that others have compiled of the same code."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
