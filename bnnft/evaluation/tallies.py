"""Sums over batches, one for each fault map and one for the clean run, and how processes merge them."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from bnnft.evaluation.answers import kind

if TYPE_CHECKING:  # importing it takes matplotlib along
    from torchmetrics import Metric

Reduce = Callable[[Tensor], Tensor]  # returns the sum of a tensor over processes


class Tally(Protocol):
    """What a score keeps of the answers under several maps, each in a slot of its own."""

    def add(self, slot: int, answers: Any) -> None:
        """Take in the answers to one batch."""
        ...

    def merge(self, reduce: Reduce) -> None:
        """Put together what all processes have; a process without data takes part."""
        ...

    def values(self) -> Tensor:
        """Return the score of each slot, float64; NaN of nothing."""
        ...

    @property
    def empty(self) -> bool:
        """Whether nothing was added."""
        ...

    @property
    def remark(self) -> str:
        """What a reader of the scores must know, nothing in most cases."""
        ...


class Counts:
    """Sums and counts: the score is their ratio. Takes as much memory however much is added.

    Args:
        slots: number of sums.
        device: where they are kept.
        dtype: of the sums; int64 for answers that are right or wrong.

    ``add`` takes a sum, a count, and the number of answers that were none.

    Example:
        >>> counts = Counts(2)
        >>> counts.add(0, (3, 4, 0))
        >>> counts.values()
        tensor([0.7500,    nan], dtype=torch.float64)
    """

    def __init__(self, slots: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.int64) -> None:
        self.sums = torch.zeros(slots, dtype=dtype, device=device)
        self.counts = torch.zeros(slots, dtype=torch.int64, device=device)
        self.lost = torch.zeros(slots, dtype=torch.int64, device=device)

    def add(self, slot: int, answers: tuple[Tensor | float, Tensor | int, Tensor | int]) -> None:
        """Add a sum, a count and a number of lost answers."""
        for total, value in zip((self.sums, self.counts, self.lost), answers, strict=True):
            total[slot] += value

    def merge(self, reduce: Reduce) -> None:
        """Sum over processes."""
        self.sums, self.counts, self.lost = reduce(self.sums), reduce(self.counts), reduce(self.lost)

    def values(self) -> Tensor:
        """Return the ratio of each slot."""
        return self.sums.cpu().to(torch.float64) / self.counts.cpu()

    @property
    def empty(self) -> bool:
        """Whether nothing was counted."""
        return not bool(self.counts[0])

    @property
    def remark(self) -> str:
        """Which share of the answers was none."""
        lost, counts = int(self.lost.sum()), int(self.counts.sum())
        if not lost:
            return ""
        return f"{lost} of {counts} answers under all maps count as wrong: their highest score is not finite"


class Clones:
    """A torchmetrics metric for each slot, which processes merge as that metric does.

    Args:
        metric: cloned and reset for each slot; it stays as it is.
        slots: number of clones.
        device: where they are kept.

    ``add`` takes the arguments of the metric's ``update``: a tuple, or a dict by name.
    """

    def __init__(self, metric: "Metric", slots: int, device: torch.device | str = "cpu") -> None:
        self.metrics = [metric.clone().to(device) for _ in range(slots)]
        self.batches, self.lost = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
        for clone in self.metrics:
            clone.reset()
        self._gather(False)

    def add(self, slot: int, answers: tuple[Any, ...] | Mapping[str, Any]) -> None:
        """Update one clone."""
        named: Mapping[str, Any] = answers if isinstance(answers, Mapping) else {}
        places: tuple[Any, ...] = () if isinstance(answers, Mapping) else tuple(answers)
        self.metrics[slot].update(*places, **named)
        first = next(iter((*places, *named.values())), None)
        self.batches += 1
        if isinstance(first, Tensor) and first.is_floating_point():
            self.lost += first.isnan().any()

    def merge(self, reduce: Reduce) -> None:
        """Let the metrics gather over processes when they compute."""
        self._gather(True)
        self.batches, self.lost = reduce(self.batches), reduce(self.lost)

    def values(self) -> Tensor:
        """Return what each clone computes."""
        return torch.tensor([_number(metric) for metric in self.metrics], dtype=torch.float64)

    @property
    def empty(self) -> bool:
        """Whether nothing was added."""
        return not bool(self.batches)

    @property
    def remark(self) -> str:
        """Whether the predictions were numbers."""
        return f"predictions of {int(self.lost)} batches under all maps hold NaN" if self.lost else ""

    def _gather(self, over_processes: bool) -> None:
        for metric in self.metrics:
            parts: Iterable[Any] = metric.modules()
            for part in parts:
                if hasattr(part, "distributed_available_fn"):
                    part.distributed_available_fn = _several_processes if over_processes else _one_process


def _several_processes() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _one_process() -> bool:
    return False


def _number(metric: "Metric") -> float:
    with warnings.catch_warnings():  # data of other processes are not seen by what asks whether there were any
        warnings.filterwarnings("ignore", message="The ``compute`` method of metric")
        value = metric.compute()
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value)
    found = f"values of shape {tuple(value.shape)}" if isinstance(value, Tensor) else kind(value)
    raise ValueError(f"score must compute one number, but {type(metric).__name__} computes {found}")
