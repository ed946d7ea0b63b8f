"""Which answers of a classifier are right, where its scores and the targets say so without a doubt."""

from typing import Any

from torch import Tensor, nn

REMEDY = (
    "For other answers give correct= (a function of module and batch that returns a bool for each answer) or score= "
    "(a torchmetrics Metric, or a function of module and batch that returns a sum and a count)"
)


class ClassAnswers:
    """Judges the answers of a classifier on batches ``(inputs, targets)``.

    Called with a module and a batch it returns for each answer whether the highest score is the target's, and whether
    the highest score is finite: where it is not there is no answer, which counts as wrong.

    Raises:
        ValueError: the module returns no class scores of shape (N, C, ...), C >= 2, or the targets are no integers
            from 0 to C - 1 of shape (N, ...); or the shape says not which dimension the classes are in.

    Example:
        >>> import torch
        >>> scores, targets = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, torch.nan]]), torch.tensor([1, 1, 1])
        >>> ClassAnswers()(nn.Identity(), (scores, targets))
        (tensor([ True, False, False]), tensor([ True,  True, False]))
    """

    def __init__(self) -> None:
        self._checked: Tensor | None = None  # targets of the last batch, whose values were looked at once

    def __call__(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """Return for each answer of the batch whether it is right, and whether there is one, as bool."""
        inputs, targets = pair(batch, f"accuracy needs batches (inputs, targets), got {kind(batch)}. {REMEDY}")
        scores = model(inputs)
        if fault := class_score_fault(scores, targets):
            raise _unsuitable(fault, scores, targets)
        if targets is not self._checked:
            if targets.numel() and not (targets.min() >= 0 and targets.max() < scores.shape[1]):
                found = f"the targets go from {int(targets.min())} to {int(targets.max())}"
                raise _unsuitable(found, scores, targets)
            self._checked = targets
        best, answers = scores.max(1)  # NaN where any score is
        answered = best.isfinite()
        return (answers == targets) & answered, answered


def class_score_fault(scores: Any, targets: Any) -> str:
    """Return why scores and targets are not those of a classifier, nothing if they are."""
    if not isinstance(scores, Tensor) or not isinstance(targets, Tensor):
        return "they are not both tensors"
    if scores.is_complex() or str(scores.dtype) == "torch.bool":
        return "the scores are no real numbers"
    if targets.is_floating_point() or targets.is_complex() or str(targets.dtype) == "torch.bool":
        return "the targets are no integers"
    if scores.dim() < 2 or scores.shape[1] < 2:
        return "the scores have fewer than two classes in dimension 1"
    if targets.shape != scores.shape[:1] + scores.shape[2:]:
        return "the targets have not the shape of the scores without dimension 1"
    if scores.dim() > 2 and targets.shape == scores.shape[:-1]:
        return "the classes may be in dimension 1 or in the last one, by the shapes"
    return ""


def _unsuitable(fault: str, scores: Any, targets: Any) -> ValueError:
    return ValueError(
        "accuracy needs class scores of shape (N, C, ...), C >= 2, and integer targets from 0 to C - 1 of shape "
        f"(N, ...), got scores {kind(scores)} and targets {kind(targets)}: {fault}. {REMEDY}"
    )


def kind(value: Any) -> str:
    """Return what a value is, for an error: shape and type of a tensor, the type of anything else.

    Example:
        >>> import torch
        >>> kind(torch.zeros(2, 3)), kind({"logits": 1})
        ('(2, 3) float32', 'dict')
    """
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, tuple | list):
        return f"{type(value).__name__} of {len(value)}"
    return type(value).__name__


def pair(batch: Any, message: str) -> tuple[Any, Any]:
    """Return the two parts of a batch ``(inputs, targets)``, or raise ValueError with this message."""
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise ValueError(message)
    return batch[0], batch[1]
