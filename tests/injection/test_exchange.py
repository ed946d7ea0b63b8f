"""Two values exchanged at some places, with gradients of first and second order."""

import pytest
import torch

from bnnft.injection.exchange import exchange, exchanged, exchanged_made, with_turned_gradient

PLACES = torch.tensor([0, 3, 4])
SIGNS = torch.tensor([-1.0, 1, 1, -1, -1, 1])


@pytest.mark.parametrize(
    ("low", "high", "middle"),
    [
        (-2.0, 2.0, torch.zeros(())),
        (0.0, 1.0, torch.tensor([[0.5]])),
        (torch.tensor([[-1.0], [2.0]]), torch.tensor([[3.0], [4.0]]), torch.tensor([[1.0], [3.0]])),
    ],
    ids=["symmetric", "0 and 1", "others in each row"],
)
def test_one_value_becomes_the_other_at_the_places_and_nowhere_else(low, high, middle):
    is_high = torch.tensor([[True, False, True], [False, True, False]])
    values = torch.where(is_high, high, low)
    expected = torch.where(is_high ^ (SIGNS.view(2, 3) < 0), high, low)
    assert torch.equal(exchanged(values, PLACES, middle), expected)
    assert torch.equal(values, torch.where(is_high, high, low)), "a copy"
    with_graph = exchanged_made(values.clone().requires_grad_() * 1, PLACES, middle)
    assert torch.equal(with_graph, expected)
    assert with_graph.requires_grad
    with torch.inference_mode():
        kept = values.clone()
        assert torch.equal(exchanged_made(kept, PLACES, middle), expected)
        assert torch.equal(kept, values)
    assert exchanged_made(values, PLACES, middle) is values
    assert torch.equal(exchange(values, PLACES, middle), torch.where(is_high, high, low)), "twice is as before"


def test_no_places_change_nothing():
    values = torch.ones(6)
    assert exchanged_made(values, PLACES[:0], torch.zeros(())) is values
    assert bool((values == 1).all())


@pytest.mark.parametrize("exact", [False, True])
def test_gradients_of_both_orders_pass_or_change_sign(exact):
    """The function is x -> s x at the places, with a derivative of 1 or of s."""
    x, weights = torch.randn(6, requires_grad=True), torch.randn(6)
    signs = SIGNS if exact else torch.ones(6)
    values = exchanged(x, PLACES, torch.zeros(()), exact)
    assert torch.equal(values, x.detach() * SIGNS)
    (first,) = torch.autograd.grad((weights * values.square()).sum(), x, create_graph=True)
    assert torch.allclose(first, 2 * weights * values * signs)
    (second,) = torch.autograd.grad((first * torch.arange(6)).sum(), x)
    assert torch.allclose(second, 2 * weights * torch.arange(6) * signs * signs)


def test_only_the_gradient_changes_sign():
    x = torch.randn(2, 3, requires_grad=True)
    values = with_turned_gradient(x, PLACES)
    assert torch.equal(values, x)
    (gradient,) = torch.autograd.grad(values.sum(), x)
    assert torch.equal(gradient, SIGNS.view(2, 3))
