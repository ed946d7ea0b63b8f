"""An operation: which of what it is given is of the batch, of parameters, or a constant."""

import pytest
import torch
from torch import nn

from bnnft.tracing.origins import CONSTANT, MAYBE, Origins
from bnnft.tracing.steps import step_of

BATCH = torch.randn(3, 4)


@pytest.fixture
def origins():
    known = Origins(nn.Linear(4, 2))
    known.register()
    return known


def weight(origins):
    return origins.parameters["weight"]


def test_what_has_nothing_to_do_with_parameters_is_no_step(origins):
    assert step_of(origins, torch.add, (BATCH, BATCH), {}) is None


def test_a_parameter_and_the_batch(origins):
    step = step_of(origins, nn.functional.linear, (BATCH, weight(origins)), {})
    assert step.of_batch
    assert step.operation == "linear"
    assert [origin is None for origin in step.origins] == [True, False]
    assert step.targets == []


def test_parameters_alone(origins):
    step = step_of(origins, torch.mul, (weight(origins), 2), {})
    assert not step.of_batch
    assert step.origins[0].parameters == {"weight"}


@pytest.mark.parametrize(
    ("function", "shape", "is_constant"),
    [
        (torch.less, (2, 4), True),  # compared element by element
        (torch.less, (1, 4), True),
        (torch.less, (3, 2, 4), False),
        (nn.functional.linear, (2, 4), False),  # it is multiplied with it
    ],
)
def test_what_was_made_of_nothing_is_a_constant_where_it_meets_a_parameter_element_by_element(
    origins, function, shape, is_constant
):
    numbers = torch.rand(shape)
    origins.keep(numbers, MAYBE)
    step = step_of(origins, function, (numbers, weight(origins)), {})
    assert (step.origins[0] == CONSTANT) is is_constant
    assert step.of_batch is not is_constant


def test_a_single_number_of_the_batch_is_a_constant_beside_a_parameter(origins):
    step = step_of(origins, torch.mul, (weight(origins), BATCH.mean()), {})
    assert not step.of_batch
    assert step_of(origins, torch.mul, (BATCH, BATCH.mean()), {}) is None


def test_writes_and_outputs_are_targets_and_a_form_alone_is_of_its_model(origins):
    into, kept = torch.zeros(2, 4), weight(origins).detach().clone()
    origins.keep(kept, CONSTANT)
    assert step_of(origins, torch.Tensor.copy_, (kept, BATCH), {}).targets == [kept]
    (target,) = step_of(origins, torch.sign, (weight(origins),), {"out": into}).targets
    assert target is into
    step = step_of(origins, torch.zeros_like, (weight(origins),), {})
    assert not step.of_batch


def test_places_of_elements_follow_a_rearranging_operation(origins):
    step = step_of(origins, torch.Tensor.t, (weight(origins),), {})
    (places,) = step.rearranged(origins, torch.Tensor.t, (weight(origins),), {})
    first = list(origins.parameters).index("weight") and origins.parameters["bias"].numel()
    assert torch.equal(places, first + torch.arange(8).view(2, 4).t())
    joined = (weight(origins), torch.zeros(1, 4))
    origins.keep(joined[1], CONSTANT)
    step = step_of(origins, torch.cat, (joined,), {})
    (places,) = step.rearranged(origins, torch.cat, (joined,), {})
    assert torch.equal(places[2:], torch.full((1, 4), -1))
