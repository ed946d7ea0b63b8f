"""Where the flips of training go: into latent weights or operands, and what to say about it."""

from collections.abc import Sequence
from typing import Literal

from lightning.pytorch.utilities import rank_zero_info

from bnnft.ber import ErrorModel
from bnnft.injection.operands import OperandWatch
from bnnft.injection.sites import Site, Weights

How = Literal["latent", "operand", "auto"]


def placed(site: Site, faults: dict[str, str], how: How, first: bool) -> Site:
    """Decide where a site gets its flips; in the first watched batch a latent that is not the bit counts as a fault."""
    if site.operand is None:
        return site
    unlike = first and site.operand.how == "graph"
    if unlike and how == "latent":
        faults.setdefault(site.name, f"{site.name}: its operand has other signs")
    inexact = unlike or site.name in faults or stepped_in_backward(site)
    return site._replace(in_operand=how == "operand" or (how == "auto" and (inexact or site.in_operand)))


def report(
    error_model: ErrorModel, sites: Sequence[Site], watch: OperandWatch, weights: Weights | None, biases: bool
) -> None:
    """Say once where the flips go, and what else is binary."""
    bits, names = sum(site.weight.numel() for site in sites), []
    for site in sites:
        found = "" if site.operand is None else f"found by {site.operand.how}"
        origin = "known" if site.known else "named" if weights is not None else found
        names.append(f"{site.name} ({origin}, {'operand' if site.in_operand else 'latent'})")
    rank_zero_info(f"BitFlipTraining: {error_model} on {bits:,} bits in {', '.join(names)}")
    left = [name for name in watch.operands() if watch.parameters[name].dim() == 1]
    if left and not biases and weights is None:
        rank_zero_info(f"BitFlipTraining leaves binary biases alone: {', '.join(left)}; biases=True flips them")


def stepped_in_backward(site: Site) -> bool:
    """Tell whether a hook runs when the gradient of a weight is accumulated, as of an optimizer in backward."""
    return bool(getattr(site.weight, "_post_accumulate_grad_hooks", None))


def check_steps(sites: Sequence[Site]) -> None:
    """Raise RuntimeError for a weight that an optimizer may write to while its bits are turned."""
    stepped = [site.name for site in sites if not site.in_operand and stepped_in_backward(site)]
    if stepped:
        raise RuntimeError(
            f"{', '.join(stepped)}: a hook that runs when the gradient is accumulated, as of an optimizer in backward, "
            "may write to this weight while its bits are turned. BitFlipTraining(..., how='operand') never turns them "
            "in the weight"
        )
