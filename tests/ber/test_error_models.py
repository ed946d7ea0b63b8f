"""The contract of every error model.

Counts are held against exact binomial tests: each fails by chance with a probability of 1e-9, for a fixed seed.
"""

import importlib
import inspect
import math
import pickle
import pkgutil
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from scipy.stats import binomtest
from torch import nn

import bnnft.ber
from bnnft import flipped
from bnnft.ber import (
    Asymmetric,
    Bram28,
    Chip,
    Clustered,
    ErrorModel,
    Independent,
    Key,
    PerLayer,
    Protected,
    Rram,
    Scrambled,
    Secded,
    Sequence,
    Sram14,
    Sram65,
    as_error_model,
    checked_flips,
)
from bnnft.nn import BinaryLinear

FALSE_ALARM = 1e-9


@dataclass(frozen=True)
class Example:
    model: ErrorModel
    rate_of_zeros: float
    """Probability that a stored 0 reads wrong."""
    rate_of_ones: float
    fixed: bool = False
    """Whether the same bits are wrong in every draw."""
    clustered: bool = False
    """Whether bits of one weight are not independent: then the rate is that of the mean over many draws."""


CLUSTERED = {"rows": 16, "columns": 4, "block_dispersion": 1.0, "line_dispersion": 1.0}
CONCENTRATED = CLUSTERED | {"block_dispersion": 0.05, "line_dispersion": 1e-3}

# An error model needs an entry here, and its class is then held to the contract below.
EXAMPLES = {
    "Asymmetric": [
        Example(Asymmetric(zeros, ones), zeros, ones)
        for zeros, ones in ((0.02, 0.01), (0, 0.1), (0.3, 0), (0.1, 0.1), (0.7, 0.9), (1, 0.2))
    ],
    "Bram28": [
        Example(Bram28(), 0, 7.02e-4, fixed=True),
        Example(Bram28(0.545, chip=None), 0, (2.23e-4 * 7.02e-4) ** 0.5),
        Example(Bram28(chip=None, placement="bitline"), 0, 7.02e-4, clustered=True),
    ],
    "Chip": [
        *(Example(Chip(rate, chip=7), rate, rate, fixed=True) for rate in (0.001, 0.1, 0.5, 0.8)),
        Example(Chip(0.1), 0.1, 0.1),
        Example(Chip(0.1, 7, "stuck_at"), 0.05, 0.05, fixed=True),
        Example(Chip(0.1, None, "stuck_at", stuck_at_1=0.2), 0.02, 0.08),
    ],
    "Clustered": [
        Example(Clustered(0.1, chip=3, **CLUSTERED), 0.1, 0.1, fixed=True, clustered=True),
        Example(Clustered(0.01, **CLUSTERED), 0.01, 0.01, clustered=True),
        Example(Clustered(0.1, lines="wordline", **CLUSTERED), 0.1, 0.1, clustered=True),
        Example(Clustered(0.9, **CONCENTRATED), 0.9, 0.9, clustered=True),
        Example(Clustered(0.2, kind="stuck_at", stuck_at_1=0, **CLUSTERED), 0, 0.2, clustered=True),
    ],
    "Independent": [Example(Independent(rate), rate, rate) for rate in (0.001, 0.1, 0.5, 0.8)],
    "PerLayer": [Example(PerLayer({"*": Asymmetric(0.02, 0.01), "fc*": 0.5}, scale=2), 0.04, 0.02)],
    "Protected": [
        Example(Protected(0.2, share=0.25), 0.15, 0.15),
        Example(Protected(0.2, share=0.25, layers=["fc*"]), 0.2, 0.2),
        Example(Protected(0.2, share=0), 0.2, 0.2),
    ],
    "Rram": [Example(Rram(), 0.033, 0.033)],
    "Scrambled": [
        Example(Scrambled(Asymmetric(0, 0.2)), 0.1, 0.1),
        Example(Scrambled(Chip(0.4, 7, "stuck_at", stuck_at_1=0.1), mask=3), 0.2, 0.2, fixed=True),
    ],
    "Secded": [
        Example(Secded(0.1, word=8), 0.1 * (1 - 0.9**12), 0.1 * (1 - 0.9**12), clustered=True),
        Example(Secded(Chip(0.02, 3)), 0.02 * (1 - 0.98**71), 0.02 * (1 - 0.98**71), fixed=True, clustered=True),
    ],
    "Sequence": [
        Example(Sequence([Chip(0.1, chip=7), 0.2]), 0.1 * 0.8 + 0.9 * 0.2, 0.1 * 0.8 + 0.9 * 0.2),
        Example(Sequence([Asymmetric(0, 0.5), Asymmetric(0.5, 0)]), 0.5, 0.25),
    ],
    "Sram14": [Example(Sram14(), 0.006065, 0.006065, fixed=True)],
    "Sram65": [Example(Sram65(0.5), 0.0156, 0.0156, fixed=True), Example(Sram65(0.55, chip=None), 0.0023, 0.0023)],
}


def error_model_classes():
    """Every class of a file of the package that can be built and is an error model."""
    modules = [importlib.import_module(f"bnnft.ber.{file.name}") for file in pkgutil.iter_modules(bnnft.ber.__path__)]
    classes = {value for module in modules for value in vars(module).values() if isinstance(value, type)}
    return {cls.__name__ for cls in classes if issubclass(cls, ErrorModel) and not inspect.isabstract(cls)}


ALL = [example for examples in EXAMPLES.values() for example in examples]


def of_models(examples):
    return pytest.mark.parametrize("example", examples, ids=lambda example: str(example.model))


every_model = of_models(ALL)


@pytest.fixture(scope="module")
def weight():
    return torch.randn(300, 1001, generator=torch.Generator().manual_seed(0))


def agree(count, trials, rate):
    return binomtest(int(count), int(trials), rate).pvalue > FALSE_ALARM


@pytest.mark.parametrize("name", sorted(error_model_classes()))
def test_every_error_model_has_an_example(name):
    assert name in EXAMPLES, f"add an example of {name} to EXAMPLES in {__file__}: it is held to the contract there"


def test_every_example_is_found_in_the_package():
    assert set(EXAMPLES) == error_model_classes()


@every_model
def test_model_is_an_error_model(example):
    assert isinstance(example.model, ErrorModel)
    assert as_error_model(example.model) is example.model


@every_model
def test_flips_are_sorted_distinct_int64_indices_on_the_device_of_the_weight(example, weight):
    flips = example.model.flips(weight, Key(1))
    assert flips.dtype == torch.int64
    assert flips.device == weight.device
    assert flips.ndim == 1
    assert bool((flips.diff() > 0).all())
    assert bool(((flips >= 0) & (flips < weight.numel())).all())
    assert checked_flips(flips, weight, example.model, "fc1.weight") is flips


@every_model
def test_a_curve_goes_over_its_points_from_the_fewest_errors_to_the_most(example):
    models = [example.model.at(example.model.axis, point) for point in example.model.points]
    rates = [model.rate for model in models if model.rate is not None]
    assert len(models) >= 4
    assert rates == sorted(rates)
    assert all(isinstance(model, ErrorModel) for model in models)


@every_model
def test_errors_at_their_whole_rate_are_the_same_object_and_keep_what_they_have_drawn(example):
    assert example.model.scaled(1) is example.model


@every_model
@pytest.mark.parametrize("container", ["list", "mapping"])
def test_what_a_config_takes_apart_is_put_together_again(example, container):
    """OmegaConf, in whose containers Hydra hands over what it built, takes every dataclass for a config."""
    held = OmegaConf.create([] if container == "list" else {}, flags={"allow_objects": True})
    held.append(example.model) if container == "list" else held.update({0: example.model})
    assert not isinstance(held[0], ErrorModel)
    assert as_error_model(held[0]) == example.model
    assert Sequence(OmegaConf.create([held[0]], flags={"allow_objects": True})).models == (example.model,)
    assert PerLayer(OmegaConf.create({"*": held[0]}, flags={"allow_objects": True})).rates == {"*": example.model}


@every_model
@pytest.mark.parametrize("shape", [(0,), (), (1,), (3, 1, 2)])
def test_small_weights_have_flips_in_range(example, shape):
    flips = example.model.flips(torch.randn(shape), Key(1))
    assert set(flips.tolist()) <= set(range(torch.Size(shape).numel()))


@of_models([example for example in ALL if not example.clustered])
@pytest.mark.parametrize("position", range(2))
def test_flip_rate_of_each_stored_bit_is_the_stated_one(example, weight, position):
    """With unequal shares of the bits: 69 % ones."""
    weight = weight + 0.5
    flips = example.model.flips(weight, Key(position, position=position))
    ones = weight.flatten() > 0
    assert agree(ones[flips].sum(), ones.sum(), example.rate_of_ones)
    assert agree((~ones[flips]).sum(), (~ones).sum(), example.rate_of_zeros)


def bits_of_a_block(model):
    """Return how many bits fail together: of four weights each has its own."""
    if hasattr(model, "rows"):
        return model.rows * model.columns
    return 16 * model.word if hasattr(model, "word") else bits_of_a_block(model.model)


@of_models([example for example in ALL if example.clustered])
def test_mean_flip_rate_of_clusters_is_the_stated_one(example):
    """Means over the blocks of four weights, which are independent of each other.

    Within the empirical Bernstein bound (Maurer and Pontil 2009, theorem 4).
    """
    generator, size = torch.Generator().manual_seed(1), bits_of_a_block(example.model)
    shares = {True: [], False: []}
    for position in range(4):
        ones = torch.randn(max(256, 320_000 // size), size, generator=generator) + 0.5 > 0
        wrong = torch.zeros_like(ones)
        wrong.view(-1)[example.model.flips(2.0 * ones - 1, Key(1, position=position))] = True
        shares[True] += ((wrong & ones).sum(1) / ones.sum(1)).tolist()
        shares[False] += ((wrong & ~ones).sum(1) / (~ones).sum(1)).tolist()
    for bit, rate in ((True, example.rate_of_ones), (False, example.rate_of_zeros)):
        bound, blocks = math.log(2 / FALSE_ALARM), len(shares[bit])
        wide = math.sqrt(2 * np.var(shares[bit], ddof=1) * bound / blocks) + 7 * bound / (3 * (blocks - 1))
        assert abs(np.mean(shares[bit]) - rate) < wide


@every_model
def test_the_rates_of_stored_bits_are_the_stated_ones(example):
    """Which the flips are held to above."""
    assert example.model.bit_rates("a.weight") == pytest.approx((example.rate_of_zeros, example.rate_of_ones))


@every_model
def test_same_key_gives_the_same_flips(example, weight):
    expected = example.model.flips(weight, Key(1, 2, 3, "test", "a.weight"))
    assert torch.equal(example.model.flips(weight, Key(1, 2, 3, "test", "a.weight")), expected)


@every_model
@pytest.mark.parametrize("other", [Key(2), Key(1, draw=1), Key(1, position=1), Key(1, purpose="test")], ids=str)
def test_other_keys_give_other_flips_but_in_a_chip(example, weight, other):
    same = torch.equal(example.model.flips(weight, other), example.model.flips(weight, Key(1)))
    assert same == (example.fixed and other.position == 0)


@of_models([example for example in ALL if not example.model.reads_bits])
def test_flips_that_do_not_depend_on_the_bits_say_so_truly(example, weight):
    assert torch.equal(example.model.flips(-weight, Key(1)), example.model.flips(weight, Key(1)))


@of_models([example for example in ALL if example.model.rate is not None])
def test_rate_is_the_mean_over_equally_many_ones_and_zeros(example):
    failing = 2 if getattr(example.model, "kind", "") == "stuck_at" else 1  # cells for each that shows
    assert example.model.rate == pytest.approx(failing * (example.rate_of_ones + example.rate_of_zeros) / 2)


@of_models([example for example in ALL if not example.clustered])
def test_errors_at_half_the_rate_are_of_the_same_kind(example, weight):
    model = example.model.scaled(0.5)
    if isinstance(example.model, Sequence):  # the rate of errors on errors is no multiple
        assert [part.rate for part in model.parts] == [part.rate / 2 for part in example.model.parts]
        return
    flips, ones = model.flips(weight, Key(2)), weight.flatten() > 0
    assert agree(ones[flips].sum(), ones.sum(), example.rate_of_ones / 2)
    assert agree((~ones[flips]).sum(), (~ones).sum(), example.rate_of_zeros / 2)


@every_model
def test_flipping_and_restoring_is_exact(example):
    layer = BinaryLinear(300, 50, bias=False)
    before, clean = layer.weight.detach().clone(), layer.bits()
    with flipped(nn.ModuleDict({"fc1": layer}), example.model, seed=1) as flips:
        changed = (layer.bits() != clean).flatten().nonzero().squeeze(1)
    assert torch.equal(changed, flips["fc1.weight"])
    assert torch.equal(changed, example.model.flips(before, Key(1, name="fc1.weight")))
    assert torch.equal(layer.bits(), clean)
    assert torch.equal(layer.weight.view(torch.int32), before.view(torch.int32))


@every_model
def test_models_are_equal_and_pickle_whatever_they_have_drawn(example, weight):
    example.model.flips(weight, Key(1))
    copy = pickle.loads(pickle.dumps(example.model))
    assert copy == example.model
    assert torch.equal(copy.flips(weight, Key(1)), example.model.flips(weight, Key(1)))


@every_model
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_flips_depend_on_the_signs_alone(example, weight, dtype):
    expected = example.model.flips(weight, Key(1))
    assert torch.equal(example.model.flips(weight.sign().to(dtype), Key(1)), expected)
    assert torch.equal(example.model.flips(3 * weight, Key(1)), expected)
    assert torch.equal(example.model.flips(weight.t().contiguous().t(), Key(1)), expected)


@every_model
def test_drawing_changes_neither_the_weight_nor_torch_generator(example, weight):
    before, state = weight.clone(), torch.get_rng_state()
    example.model.flips(weight, Key(1))
    assert torch.equal(weight, before)
    assert torch.equal(torch.get_rng_state(), state)


# stated here and not asked of the model: one that says wrongly that it reads no bits would not be looked at
READS_BITS = {"Asymmetric", "Bram28", "PerLayer", "Scrambled", "Sram14"}


@every_model
def test_whether_flips_depend_on_the_bits_is_as_stated(example, weight):
    """Where both rates differ or cells are stuck, the flips of a weight are not those of its negative."""
    depend = example.rate_of_zeros != example.rate_of_ones or getattr(example.model, "kind", "") == "stuck_at"
    assert example.model.reads_bits == (depend or type(example.model).__name__ in READS_BITS)
    if depend:
        assert not torch.equal(example.model.flips(-weight, Key(1)), example.model.flips(weight, Key(1)))


def test_every_error_model_has_a_rate_but_those_that_are_made_of_several():
    without = {type(example.model).__name__ for example in ALL if example.model.rate is None}
    assert without == {"PerLayer", "Protected", "Scrambled", "Secded", "Sequence"}


@pytest.mark.parametrize("build", [Independent, Chip, Clustered, lambda rate: Asymmetric(rate, rate)])
@pytest.mark.parametrize("rate", [0, 1])
def test_a_rate_is_a_float_whatever_number_it_was(build, rate):
    assert isinstance(build(rate).rate, float)
    assert repr(build(rate)) == repr(build(float(rate)))


@every_model
def test_an_error_model_cannot_be_changed(example):
    name = next(iter(inspect.signature(type(example.model)).parameters), "rate")
    with pytest.raises(AttributeError):
        setattr(example.model, name, 0)


@pytest.mark.parametrize(
    "wrap",
    [Scrambled, Protected, Secded, lambda model: Sequence([model])],
    ids=["scrambled", "protected", "secded", "sequence"],
)
def test_an_error_model_in_another_one_is_taken_out_of_a_container_of_a_config(wrap):
    inner = OmegaConf.structured(Asymmetric(0, 0.2))
    assert wrap(inner) == wrap(Asymmetric(0, 0.2))
    assert repr(wrap(inner)) == repr(wrap(Asymmetric(0, 0.2)))
