"""Takes a score of a model, clean and under all fault maps, batch by batch."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from bnnft.evaluation.curve import BERCurve
from bnnft.evaluation.maps import FaultMaps
from bnnft.evaluation.scores import Score
from bnnft.evaluation.tallies import Reduce
from bnnft.tracing.tracking import tensors

Around = Callable[[], AbstractContextManager[Any]]


class ScoreMeter:
    """A score of a model, clean and under every fault map.

    Args:
        score: what to measure, see :func:`bnnft.evaluation.scores.as_score`.
        maps: the fault maps, with the model that they are for.

    Example:
        >>> import torch
        >>> from bnnft.ber import Independent
        >>> from bnnft.evaluation.maps import Flipping
        >>> from bnnft.evaluation.scores import as_score
        >>> from bnnft.nn import BinaryLinear
        >>> model = BinaryLinear(64, 4, bias=False)
        >>> meter = ScoreMeter(as_score(), FaultMaps(model, [Independent(0.0)], maps=1, flipping=Flipping()))
        >>> x = torch.randn(8, 64)
        >>> meter.update((x, model(x).argmax(1)))
        >>> meter.curve([0]).clean
        1.0
    """

    def __init__(self, score: Score, maps: FaultMaps) -> None:
        self.score, self.maps = score, maps
        self._tally = score.tally(maps.slots, maps.device)
        self._batches, self._samples = 0, 0
        self._waiting: list[tuple[Any, Around]] | None = [] if maps.wanted else None

    def update(self, batch: Any, around: Around = nullcontext) -> None:
        """Run one batch clean and under every map, at once or as soon as enough samples are there.

        Args:
            batch: what the score is taken of, on the model's device.
            around: makes a context for each run, such as autocast, which keeps the cast of a weight for as long as it
                is entered.
        """
        if self._waiting is None:
            self._run(batch, around)
            return
        self._waiting.append((batch, around))
        self._samples += next((len(tensor) for tensor in tensors(batch) if tensor.dim()), 1)
        if self._samples >= self.maps.wanted:
            self._run_waiting()

    def _run_waiting(self) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting:
            self.maps.show([self._answers(*each) for each in waiting])
        for each in waiting or ():
            self._run(*each)

    def _answers(self, batch: Any, around: Around) -> Callable[[], Any]:
        def answers() -> Any:
            with around():
                return self.score.answers(self.maps.model, batch)

        return answers

    def _run(self, batch: Any, around: Around) -> None:
        answers = self._answers(batch, around)
        clean = self.maps.clean(answers)
        for run in self.maps.runs:
            seen = clean if run.map is None else self.maps.under(run, self._batches, answers)
            for slot in run.slots:
                self._tally.add(slot, seen)
        self._batches += 1

    def merge(self, reduce: Reduce) -> None:
        """Put together what all processes measured.

        Args:
            reduce: returns the sum of a tensor over processes.
        """
        self._run_waiting()
        self._tally.merge(reduce)

    @property
    def remark(self) -> str:
        """What a reader of the curve must know, nothing in most cases."""
        return "; ".join(part for part in (self._tally.remark, self.maps.remark) if part)

    def curve(self, rates: Sequence[float], axis: str = "rate", name: str = "") -> BERCurve:
        """Return the curve of everything measured so far.

        Args:
            rates: that the points of the curve are at.
            axis: the parameter of the error model that they are of.
            name: of the curve.

        Raises:
            ValueError: nothing was measured; a metric computes no number.
        """
        self._run_waiting()
        if self._tally.empty:
            raise ValueError(f"{self.score.name} over BER needs data, but got no batch")
        values = self._tally.values()
        low, high = self.score.bounds
        # what torchmetrics draws within bounds may leave them, as R2 does: then it has none
        bounds = self.score.bounds if low <= values.min() and values.max() <= high else (-math.inf, math.inf)
        return BERCurve(
            tuple(rates),
            values[1:].view(len(rates), -1),
            float(values[0]),
            axis,
            self.score.name,
            self.score.higher_is_better,
            bounds,
            name,
        )
