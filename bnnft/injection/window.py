"""The flips of one weight in one context: while its window is open, they are in the latent weight."""

from typing import Any

import torch
from torch import Tensor

from bnnft.injection.latent_weight import LatentWeight
from bnnft.injection.signs import flip_signs
from bnnft.injection.sites import Site
from bnnft.tracing.sharding import local_part


class Window:
    """The flips of one weight in one context.

    Args:
        site: the weight.
        indices: flat, of the bits that are wrong.
        exact: let the gradient of a flipped weight change sign.
    """

    def __init__(self, site: Site, indices: Tensor, exact: bool) -> None:
        self.site, self.drawn, self.exact = site, indices, exact
        self.indices = local_part(site.weight, indices)[1]
        self.latent: LatentWeight | None = None
        self.hook: Any = None  # on the weight's gradient
        self.seen = False  # whether it has been open
        self.awaits_backward = False

    @property
    def open(self) -> bool:
        """Whether the bits are flipped now."""
        return self.latent is not None and self in self.latent.windows

    @property
    def stepped_in_backward(self) -> bool:
        """Whether somebody is called as soon as the weight's gradient is complete, as an optimizer in backward is."""
        hooks = getattr(self.site.weight, "_post_accumulate_grad_hooks", None)
        return bool(hooks) or hasattr(self.site.weight, "_in_backward_optimizers")

    def flip(self, check: bool) -> str | None:
        """Flip the bits if they are not, and return what was wrong with the weight."""
        if self.latent is None or self.open:
            return None
        fault = self.latent.flip(self, self.indices, check)
        self.seen = True
        return fault

    def restore(self, check: bool) -> str | None:
        """Put the bits back if they are flipped, and return what can't be put right."""
        self.awaits_backward = False
        return None if self.latent is None else self.latent.restore(self, check)

    def through(self, gradient: Tensor) -> Tensor | None:
        """Return the gradient through the flip, where it changes."""
        if not self.exact:
            return None
        if gradient.requires_grad:  # with create_graph, the flip is part of the graph
            signs = torch.ones_like(gradient)
            flip_signs(signs, self.drawn)
            return gradient * signs
        gradient = gradient.clone()
        flip_signs(gradient, self.drawn)
        return gradient
