"""Flip bits in the latent weight: in place, only while the model computes with it, and put back bit for bit."""

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self
from weakref import finalize

from torch import Tensor, nn

from bnnft.injection.signs import flip_signs
from bnnft.injection.sites import Site
from bnnft.injection.window import Window
from bnnft.injection.windows import Windows

__all__ = ["LatentFlips", "flip_signs"]


class LatentFlips:
    """Runs a model with flipped sign bits of its latent weights, while entered.

    With gradients on, nothing is flipped on entry. The window of a weight opens when a module is called that holds it,
    itself or in one of its parts, or that the site names. It closes at the end of the backward that reached the
    weight or what that module returned; where no backward can follow, at the end of the call. Each later call opens it
    again with the same flips, as does a backward through a call that saw them, so that every evaluation sees them:
    those of closures, of several optimizers and losses, and what checkpointing computes again. Updates between a
    backward and the next call see clean weights. A weight that is updated within the backward, by a hook, is clean as
    soon as its gradient is complete.

    Without gradients, as in evaluation, all bits are flipped from entry to exit: whatever reads the weights, by calls
    of modules or not, reads the flips.

    What autograd itself has saved of a latent weight is no longer valid once the window is closed, as after any other
    write in place: a second backward through it raises torch's error. State dicts, deep copies and pickles are clean
    at any time; ``parameters()`` are not.

    Values that others write while bits are flipped stay, with the signs put back, if they keep the signs, as a clamp
    does. Anything else is an error.

    Args:
        model: that holds the weights.
        sites: the weights.
        flips: for each site's name the sorted flat indices (int64) of the bits that are wrong.
        exact: let the gradient of a flipped weight change sign; else it passes as if nothing was flipped. Backward
            must run inside the context.
        check: compare all flipped bits with what was written when they are put back. Else that is done where torch
            has counted a write, which it does not for writes through ``.data``, numpy or a storage.

    Raises:
        ValueError: a site is not of the model.
        RuntimeError: a weight was overwritten or updated while its bits were flipped, or its memory was replaced: all
            bits that still stood are back, and the others stay as they were written; a backward ran after the exit, or
            reached a weight without a call that flipped it; the flips can't be made: the shards of a weight are
            updated within the backward, or ``exact`` under FSDP2, where no hook sees the gradient.

    Example:
        >>> import torch
        >>> from bnnft.injection.sites import find_sites
        >>> from bnnft.nn import BinaryLinear
        >>> layer, x = BinaryLinear(3, 1, bias=False), torch.ones(1, 3)
        >>> with torch.no_grad():
        ...     _ = layer.weight.fill_(0.5)
        >>> with LatentFlips(layer, find_sites(layer), {"weight": torch.tensor([0, 1])}):
        ...     output = layer(x)
        ...     flipped = layer.weight.tolist()
        ...     output.sum().backward()
        >>> output.item(), flipped, layer.weight.tolist()
        (-1.0, [[-0.5, -0.5, 0.5]], [[0.5, 0.5, 0.5]])
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        flips: Mapping[str, Tensor],
        *,
        exact: bool = False,
        check: bool = False,
    ) -> None:
        windows = [Window(site, flips[site.name], exact) for site in sites if flips[site.name].numel()]
        self._windows = Windows(model, windows, check)
        # for an interrupt between the entry and the block, or before the first line of the exit
        self._dropped = finalize(self, self._windows.close)
        self._dropped.atexit = False

    def __enter__(self) -> Self:
        """Be ready to flip; without gradients, flip."""
        try:
            self._windows.start()
        except BaseException:
            self._windows.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put every bit back and leave no hook behind."""
        self.close()

    def restore(self) -> None:
        """Put all bits back now; with gradients on, the next call of a module flips them again."""
        self._windows.restore(self._windows.windows)

    def close(self) -> None:
        """Do what the exit does; more calls do nothing."""
        try:
            self._windows.close()
        except BaseException:  # an interrupt: put the rest back before it goes on its way
            self._windows.close()
            raise
        finally:
            self._dropped.detach()
