import pytest
import torch

from bnnft.tracing.axis import Axis, axis_of, numbered

NEURONS = 3
LAYOUTS = {
    "features last": (Axis(2, NEURONS), lambda x: x.transpose(1, 2)),
    "channels": (Axis(1, NEURONS), lambda x: x),
    "flattened": (Axis(1, NEURONS), lambda x: x.flatten(1)),
    "flattened with neurons last": (Axis(1, NEURONS, minor=True), lambda x: x.transpose(1, 2).flatten(1)),
}


def values():
    """Five samples of three neurons at four positions."""
    return torch.arange(60.0).view(5, NEURONS, 4)


@pytest.mark.parametrize(("axis", "arrange"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_values_are_spread_to_samples_neurons_and_positions(axis, arrange):
    assert torch.equal(axis.spread(arrange(values())), values())


@pytest.mark.parametrize(("axis", "arrange"), LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("neuron", range(NEURONS))
def test_the_values_of_one_neuron_are_scaled_in_a_copy(axis, arrange, neuron):
    tensor, expected = arrange(values()), values()
    expected[:, neuron] *= -1
    assert torch.equal(axis.scaled(tensor, neuron, -1.0), arrange(expected))
    assert torch.equal(tensor, arrange(values()))


@pytest.mark.parametrize(("axis", "arrange"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_the_axis_is_known_by_the_numbers_of_neurons(axis, arrange):
    numbers = numbered(values(), convolution=True)
    assert axis_of(arrange(numbers), NEURONS) == axis


def test_numbers_are_of_channels_in_convolutions_and_of_features_elsewhere():
    assert numbered(torch.zeros(2, 3, 3), convolution=True)[0].tolist() == [[0] * 3, [1] * 3, [2] * 3]
    assert numbered(torch.zeros(2, 3, 3), convolution=False)[0].tolist() == [[0, 1, 2]] * 3


@pytest.mark.parametrize("numbers", [None, torch.tensor([[0, 1, 2, 2, 1, 0]]), torch.tensor([[1, 0, 2]])])
def test_there_is_no_axis_where_neurons_are_mixed(numbers):
    assert axis_of(numbers, NEURONS) is None


def test_a_tensor_fits_whose_dimension_is_a_multiple_of_the_neurons():
    assert Axis(1, 3).fits(torch.zeros(2, 6))
    assert not Axis(1, 3).fits(torch.zeros(2, 7))
    assert not Axis(2, 3).fits(torch.zeros(2, 3))
