"""On several processes: the flips of one process, equal weights on all of them, one curve for all data."""

import pytest
import torch
from commands import run_script

from bnnft.ber import Independent, Key


def run(folder, *arguments):
    """Run the script in processes of its own and return what each process saw, and the test metrics."""
    folder.mkdir()
    done = run_script("distributed.py", *arguments[:2], folder, *arguments[2:])
    assert done.returncode == 0, done.stderr[-3000:]
    seen = [torch.load(path, weights_only=True) for path in sorted(folder.glob("rank*.pt"))]
    assert len(seen) == int(arguments[1])
    return seen, torch.load(folder / "metrics.pt", weights_only=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run(tmp_path_factory.mktemp("alone") / "run", "auto", "1")


@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn", "fsdp2"])
def test_two_processes_train_as_one_does(tmp_path, alone, strategy):
    """Ranks end with equal weights, which are those of one process up to the order of sums; so are curve and margins.

    Each process draws from seed, step and position of the weight alone: with a rank in the key the ranks part ways.
    """
    ranks, metrics = run(tmp_path / "run", strategy, "2")
    (_, first), (_, second) = ranks
    assert all(torch.equal(first[name], second[name]) for name in first)
    (_, reference), expected = alone[0][0], alone[1]
    assert all(torch.allclose(first[name], reference[name], atol=1e-5) for name in first)
    names = [n for n in expected if n.startswith(("test/acc", "test/margin", "test/class_margin", "test/tolerable"))]
    assert len(names) > 10
    assert all(metrics[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6) for name in names)


def test_errors_that_read_bits_and_a_second_pass_are_those_of_one_process(tmp_path):
    arguments = ("latent", "BinaryLinear", "0.1", "average")
    ((_, reference),), expected = run(tmp_path / "alone", "auto", "1", *arguments)
    for strategy in ("ddp", "fsdp2"):
        ((_, first), (_, second)), metrics = run(tmp_path / strategy, strategy, "2", *arguments)
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert all(torch.allclose(first[name], reference[name], atol=1e-5) for name in first)
        assert metrics["test/acc_ber_0p3"] == pytest.approx(expected["test/acc_ber_0p3"])


@pytest.mark.parametrize(
    ("strategy", "how", "layer"),
    [
        ("ddp", "latent", "SignFunction"),
        ("fsdp2", "latent", "BinaryLinear"),
        ("fsdp2", "latent", "SignFunction"),
        ("fsdp2", "operand", "Centred"),
    ],
)
def test_each_process_sees_exactly_the_drawn_flips(tmp_path, strategy, how, layer):
    """With a learning rate of 0 the signs in a step are the first ones, but for the flips drawn for this step."""
    ranks, metrics = run(tmp_path / "run", strategy, "2", how, layer, "0.0")
    for signs, weights in ranks:
        clean = [
            value.sign().to(torch.int8) for name, value in weights.items() if name in ("net.0.weight", "net.2.weight")
        ]
        assert len(clean) == 2
        for step, seen in enumerate(signs):
            for position, (before, now) in enumerate(zip(clean, seen, strict=True)):
                key = Key(0, step, purpose="training").at(position)
                drawn = Independent(0.2).flips(before.float(), key) if step or layer == "BinaryLinear" else []
                if how == "operand":
                    drawn = []  # nothing is written to the weights
                assert (before != now).reshape(-1).nonzero().squeeze(1).tolist() == list(drawn)
    assert metrics["test/acc_ber_0p3"] != metrics["test/acc_ber_0"]
