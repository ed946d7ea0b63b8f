"""Tensors among the arguments of operations."""

from collections import namedtuple

import torch

from bnnft.tracing.arguments import replaced, tensors_in, unwrapped, write_over

Pair = namedtuple("Pair", "one other")
A, B, C = (torch.tensor(float(number)) for number in range(3))


def test_tensors_are_found_in_lists_tuples_and_dicts_in_their_order():
    tree = (A, [B, "text", (C,)], {"key": [A, None]}, Pair(B, 3), 4.0)
    found = list(tensors_in(tree))
    assert [id(tensor) for tensor in found] == [id(tensor) for tensor in (A, B, C, A, B)]


def test_tensors_are_replaced_by_their_identities_and_all_else_stays():
    tree = (A, [B, "text", (C,)], {"key": [A, None]}, Pair(B, 3), 4.0)
    new = torch.tensor(7.0)
    result = replaced(tree, {id(A): new})
    assert result[0] is result[2]["key"][0] is new
    assert result[1][0] is B
    assert isinstance(result[3], Pair)
    assert result[3].one is B
    assert (result[1][1], result[2]["key"][1], result[3].other, result[4]) == ("text", None, 3, 4.0)
    assert tree[0] is A


def test_what_a_transform_has_wrapped_is_found():
    seen = []

    def function(row):
        seen.append(unwrapped(row))
        return row

    values = torch.randn(3, 2)
    torch.vmap(torch.vmap(function))(values)
    assert seen[0].shape == values.shape
    assert seen[0].data_ptr() == values.data_ptr()
    assert unwrapped(values) is values


def test_values_are_written_over_and_their_gradient_passes():
    latent = torch.randn(4, requires_grad=True)
    target = latent * 1
    values = torch.ones(4)
    assert write_over(target, values) is target
    assert torch.equal(target, values)
    target.sum().backward()
    assert torch.equal(latent.grad, torch.ones(4))
