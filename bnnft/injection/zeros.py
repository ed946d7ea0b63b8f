"""Flips of zeros: what ``torch.sign`` makes of a latent of 0 is no bit before a later operation fills it."""

import torch
from torch import Tensor

from bnnft.injection.bits import Mark
from bnnft.tracing.elements import Elements
from bnnft.tracing.origins import Origin


class PendingZeros:
    """The flips that wait for zeros to become bits, by the tensor that has the zeros."""

    def __init__(self) -> None:
        self._waiting: dict[Mark, tuple[Tensor, Elements]] = {}

    def without(self, mark: Mark, values: Tensor, elements: Elements, places: Tensor, middle: Tensor) -> Tensor:
        """Return those flat places at which there are bits; the others wait.

        Args:
            mark: of the tensor.
            values: of which all but zeros are bits.
            elements: of parameters, which the values stand for.
            places: flat, of the flips.
            middle: between the two values.
        """
        if torch._C._functorch.peek_interpreter_stack() is not None:  # in torch.vmap, say: nobody can look
            return places
        there = values.detach().reshape(-1).index_select(0, places)
        if middle.dim():
            there = there - middle.expand_as(values).take(places)
        if bool(there.all()):
            return places
        none = torch.zeros(values.shape, dtype=torch.int8, device=values.device)
        waiting, _ = self._waiting.setdefault(mark, (none, elements))
        waiting.view(-1)[places[there == 0]] = 1
        return places[there != 0]

    def behind(self, origin: Origin) -> list[Mark]:
        """Return the tensors behind another one whose zeros wait."""
        return [mark for mark in origin.marks if mark in self._waiting]

    def of(self, mark: Mark) -> tuple[Tensor, Elements]:
        """Return where flips of a tensor wait, int8, and which elements its own stand for."""
        return self._waiting[mark]

    def forget(self, mark: Mark) -> None:
        """Take note that a tensor is made anew."""
        self._waiting.pop(mark, None)

    def clear(self) -> None:
        """Forget all tensors."""
        self._waiting.clear()
