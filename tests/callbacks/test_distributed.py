"""On several processes: the flips of one process, equal weights on all of them, one curve for all data."""

import pytest
import torch
import torch.nn.functional as F
from commands import run_ranks, run_script
from networks import small_data
from torch import nn

from bnnft.ber import Asymmetric, Independent, Key

SITES = ("net.0.weight", "net.2.weight")


def run(folder, launcher, *arguments):
    """Run the script in processes of its own and return what each process saw, and the test metrics."""
    folder.mkdir()
    if launcher == "torchrun":
        processes = run_ranks("distributed.py", *arguments[:2], folder, *arguments[2:])
    else:
        processes = [run_script("distributed.py", *arguments[:2], folder, *arguments[2:])]
    assert all(done.returncode == 0 for done in processes), "".join(done.stderr[-3000:] for done in processes)
    seen = [torch.load(path, weights_only=True) for path in sorted(folder.glob("rank*.pt"))]
    assert len(seen) == int(arguments[1])
    return seen, torch.load(folder / "metrics.pt", weights_only=True)


class ByHand(nn.Module):
    """The script's network, training and curve in plain loops on one process; signs are flipped by multiplication."""

    def __init__(self, errors):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.ModuleList([nn.Linear(12, 16, bias=False), nn.Linear(16, 16, bias=False), nn.Linear(16, 3)])
        self.errors, (self.x, self.y) = errors, small_data().tensors

    def forward(self, key=None, errors=None):
        """Return the scores, with the flips of a key; keeps bits, pre-activations and outputs of both hidden layers."""
        x, self.bits, self.sums, self.outputs = self.x, [], [], []
        for position, layer in enumerate(self.net[:2]):
            signs = layer.weight.detach().sign().view(-1)
            if key is not None:
                signs[errors.flips(layer.weight.detach(), key.at(position))] *= -1
            self.bits.append(signs.view_as(layer.weight).requires_grad_())
            s = F.linear(x, self.bits[-1])
            self.sums.append(s)
            x = s.clamp(-1, 1) + (torch.where(s >= 0, 1.0, -1.0) - s.clamp(-1, 1)).detach()
            self.outputs.append(x)
        return self.net[2](x)

    def train_by_hand(self, passes):
        """Train six steps on all data; passes are whether flips are in, for each pass over a batch."""
        for step in range(6):
            self.zero_grad()
            for flips in passes:
                scores = self(Key(0, step, purpose="training"), self.errors) if flips else self()
                (F.cross_entropy(scores, self.y) / len(passes)).backward()
                for layer, bits in zip(self.net, self.bits, strict=False):
                    layer.weight.grad = bits.grad + (0 if layer.weight.grad is None else layer.weight.grad)
            with torch.no_grad():
                for parameter in self.parameters():
                    parameter -= 0.1 * parameter.grad
        return dict(zip([*SITES, "net.4.weight", "net.4.bias"], self.parameters(), strict=True))

    def accuracy(self, errors):
        """Return the mean accuracy over two fault maps."""
        with torch.no_grad():
            scores = [self(Key(0, number), errors) for number in range(2)]
        return sum(float((s.argmax(1) == self.y).double().mean()) for s in scores) / 2

    def measured(self):
        """Return accuracies at two rates, margins (all thresholds are 0) and importances."""
        metrics = {f"test/acc_ber_0p{rate}": self.accuracy(Independent(rate / 10)) for rate in (1, 3)}
        gradients = torch.autograd.grad(F.cross_entropy(self(), self.y, reduction="sum"), self.outputs)
        for name, s, a, gradient in zip(("0", "2"), self.sums, self.outputs, gradients, strict=True):
            importance, s = (2 * a * gradient).detach().abs().mean(0), s.detach()
            metrics[f"test/margin/{name}"] = float(s.abs().mean())
            metrics[f"test/margin_std/{name}"] = float(s.abs().std(correction=0))
            metrics[f"test/importance/{name}"] = float(importance.mean())
            metrics[f"test/importance_variance/{name}"] = float(importance.var(correction=0))
        return metrics


@pytest.fixture(scope="module")
def expected():
    """Weights and metrics of training under independent errors, by hand."""
    reference = ByHand(Independent(0.2))
    return reference.train_by_hand([True]), reference.measured()


def assert_equal_and_as_by_hand(ranks, weights):
    """Ranks end with the same weights, which are those of one process up to the order of sums."""
    first = ranks[0][2]
    assert first.keys() == weights.keys()
    for _, _, other in ranks[1:]:
        assert all(torch.equal(first[name], other[name]) for name in first)
    assert all(torch.allclose(first[name], weights[name], atol=1e-5) for name in first)


@pytest.mark.parametrize(
    ("launcher", "strategy", "processes"),
    [
        ("lightning", "auto", "1"),
        ("lightning", "ddp", "2"),  # of which one is a new process of Python, as with the next
        ("lightning", "ddp_spawn", "2"),
        ("torchrun", "fsdp2", "2"),
    ],
)
def test_processes_train_as_a_plain_loop_in_one_does(tmp_path, expected, launcher, strategy, processes):
    """Each process draws from seed, step and position of the weight alone; with a rank in the key ranks part ways."""
    ranks, metrics = run(tmp_path / "run", launcher, strategy, processes)
    assert_equal_and_as_by_hand(ranks, expected[0])
    assert {name: metrics[name] for name in expected[1]} == pytest.approx(expected[1], rel=1e-4)


def test_errors_that_read_bits_and_a_second_pass_are_those_of_one_process(tmp_path):
    reference = ByHand(Asymmetric(0.05, 0.3))
    weights = reference.train_by_hand([True, False])
    errors = Asymmetric(0.3 * 0.05 / 0.175, 0.3 * 0.3 / 0.175)  # a mean of 0.3 in the same relation
    for strategy in ("ddp", "fsdp2"):
        ranks, metrics = run(tmp_path / strategy, "torchrun", strategy, "2", "latent", "BinaryLinear", "0.1", "average")
        assert_equal_and_as_by_hand(ranks, weights)
        assert metrics["test/acc_ber_0p3"] == pytest.approx(reference.accuracy(errors))


@pytest.mark.parametrize(
    ("strategy", "how", "layer"),
    [
        ("ddp", "latent", "SignFunction"),
        ("fsdp2", "latent", "BinaryLinear"),
        ("fsdp2", "latent", "SignFunction"),
        ("fsdp2", "operand", "Centred"),
    ],
)
def test_each_process_computes_with_exactly_the_drawn_flips(tmp_path, strategy, how, layer):
    """With a learning rate of 0 a step computes with the first bits, but for those drawn for this step."""
    ranks, metrics = run(tmp_path / "run", "torchrun", strategy, "2", how, layer, "0.0")
    for signs, outputs, weights in ranks:
        latent = weights["net.0.weight"].float()
        bits = (latent - latent.mean(1, keepdim=True) if layer == "Centred" else latent).sign()
        assert len(outputs) == len(signs) == 6
        for step, (x, output) in enumerate(outputs):
            flipped = bits.clone()
            if step or layer == "BinaryLinear":  # others are found in the first batch
                drawn = Independent(0.2).flips(latent, Key(0, step, purpose="training").at(0))
                assert len(drawn) > 10
                flipped.view(-1)[drawn] *= -1
            assert torch.allclose(output, F.linear(x, flipped), atol=1e-4)
        if how == "operand":  # nothing is written to the weights
            clean = [weights[name].sign().to(torch.int8) for name in SITES]
            assert all(torch.equal(a, b) for seen in signs for a, b in zip(seen, clean, strict=True))
    assert metrics["test/acc_ber_0p3"] != metrics["test/acc_ber_0"]


def test_compensated_and_predicted_curves_of_two_processes_are_those_of_one(tmp_path):
    seen = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        done = run_script("distributed_compensation.py", str(processes), folder)
        assert done.returncode == 0, done.stderr[-3000:]
        seen.append(torch.load(folder / "metrics.pt", weights_only=True))
    assert {"test/acc_ber_0p1", "test/predicted_acc_ber_0p1"} <= seen[0].keys()
    assert seen[1] == pytest.approx(seen[0], abs=1e-6)
