"""Data modules of small data sets: everything in memory, indexed by whole batches."""

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from bnnft.ber import Key

Batch = TypeVar("Batch")


class _Tensors(Dataset[tuple[Tensor, Tensor]]):
    """Inputs and targets that a loader fetches a batch at a time: one indexing instead of a collation."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.targets[index]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        chosen = torch.as_tensor(indices)
        return self.inputs[chosen], self.targets[chosen]


class ShuffledByEpoch(Sampler[int]):
    """Orders of samples that depend on a seed and the number of the epoch alone.

    A run that resumes goes on with the orders that it would have had; torch's own sampler asks the global generator,
    which a resumed run finds in another state. Lightning sets the epoch, and replaces the sampler where each of several
    processes is to have a share.

    Args:
        size: number of samples.
        seed: of the orders.

    Example:
        >>> sampler = ShuffledByEpoch(100, seed=0)
        >>> first = list(sampler)
        >>> sampler.set_epoch(1)
        >>> sorted(sampler) == sorted(first), list(sampler) == list(sampler), list(sampler) == first
        (True, True, False)
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed, self.epoch = size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Take the order of this epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        # the seed itself would repeat the random numbers that the initial weights were made of
        stream = Key(self.seed, self.epoch, purpose="shuffle").stream()
        generator = torch.Generator().manual_seed(stream)
        return iter(torch.randperm(self.size, generator=generator).tolist())


class ResumableLoader(DataLoader[Batch]):
    """A DataLoader that keeps its place: a run that was cut in the middle of an epoch goes on with the next batch.

    The place counts in the epoch that it was taken in alone, and its sampler must give the same order again. Data is
    best in memory, since the batches that the cut run has had are fetched once more.

    Example:
        >>> data = torch.arange(8)
        >>> loader = ResumableLoader(data, batch_size=2, sampler=ShuffledByEpoch(8, seed=0))
        >>> first, second, *rest = loader
        >>> batches = iter(loader)
        >>> place = [next(batches), next(batches), loader.state_dict()][-1]
        >>> resumed = ResumableLoader(data, batch_size=2, sampler=ShuffledByEpoch(8, seed=0))
        >>> resumed.load_state_dict(place)
        >>> all(torch.equal(a, b) for a, b in zip(resumed, rest, strict=True))
        True
    """

    _place = (0, 0)  # epoch, and number of batches that it gave
    _start: tuple[int, int] | None = None

    def state_dict(self) -> dict[str, int]:
        """Return how many batches of which epoch were given."""
        return dict(zip(("epoch", "batches"), self._place, strict=True))

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on after these batches, if the next epoch is the same."""
        self._start = self._place = (state_dict["epoch"], state_dict["batches"])

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        batches = super().__iter__()
        # only now, at the first batch, has Lightning told the sampler which epoch it is
        epoch, start = getattr(self.sampler, "epoch", 0), self._start
        self._start = None
        given = start[1] if start is not None and start[0] == epoch else 0
        for _ in range(given):
            next(batches)
        self._place = (epoch, given)
        for batch in batches:
            self._place = (epoch, self._place[1] + 1)
            yield batch


def _as_it_is(batch: Batch) -> Batch:
    return batch


class InMemoryDataModule(LightningDataModule):
    """Base of data modules whose data fits into memory.

    A subclass sets ``input_shape`` and ``num_classes`` and implements :meth:`load`. Integers of 8 bits times a power of
    two, bytes as ``(u - 128) / 128`` say, let the first layer compute in integers as well.

    Args:
        batch_size: samples in a batch, >= 1.
        validation_size: samples held out for validation, >= 1.
        split_seed: of the random split; it stays fixed while the seed of a run varies.
    """

    input_shape: tuple[int, ...]
    num_classes: int

    def __init__(self, batch_size: int, validation_size: int, split_seed: int = 0) -> None:
        super().__init__()
        if batch_size < 1 or validation_size < 1:
            raise ValueError(
                f"batch_size and validation_size must be at least 1, got {batch_size!r} and {validation_size!r}"
            )
        self.batch_size, self.validation_size, self.split_seed = batch_size, validation_size, split_seed
        self._splits: dict[str, _Tensors] = {}

    def load(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return inputs (in [-1, 1]) and targets, for training with validation and for testing."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        """Load and split the data, once."""
        if self._splits:
            return
        (inputs, targets), test = self.load()
        if self.validation_size >= len(targets):
            raise ValueError(
                f"validation_size must be below the {len(targets)} training samples, got {self.validation_size}"
            )
        order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(self.split_seed))
        held_out, rest = order[: self.validation_size], order[self.validation_size :]
        self._splits = {
            "train": _Tensors(inputs[rest], targets[rest]),
            "val": _Tensors(inputs[held_out], targets[held_out]),
            "test": _Tensors(*test),
        }

    def _loader(
        self, split: str, sampler: Sampler[int] | None = None, kind: type[DataLoader[Any]] = DataLoader
    ) -> DataLoader[Any]:
        # no workers: indexing a tensor costs less than handing a batch from one process to another
        return kind(self._splits[split], self.batch_size, sampler=sampler, collate_fn=_as_it_is, num_workers=0)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training data, shuffled by the seed of torch's global generator and the number of the epoch."""
        sampler = ShuffledByEpoch(len(self._splits["train"]), torch.initial_seed())
        return self._loader("train", sampler, ResumableLoader)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the validation data."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the test data."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the test data."""
        return self._loader("test")
