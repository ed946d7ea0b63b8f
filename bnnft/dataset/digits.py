"""The handwritten digits that scikit-learn carries: 1,797 images of 8x8, no download."""

import torch
from torch import Tensor

from bnnft.dataset.in_memory import InMemoryDataModule


class Digits(InMemoryDataModule):
    """scikit-learn's handwritten digits: 1,257 images to train, 180 to validate, 360 to test.

    Args:
        batch_size: samples in a batch.
        validation_size: samples held out of the 1,437 that are not for testing.
        split_seed: of the split into training and validation; the test images are always the same.

    Source: ``sklearn.datasets.load_digits`` (UCI optical recognition of handwritten digits, test part).

    Example:
        >>> data = Digits(batch_size=32)
        >>> data.setup("fit")
        >>> images, classes = next(iter(data.test_dataloader()))
        >>> images.shape, float(images.min()), float(images.max())
        (torch.Size([32, 1, 8, 8]), -1.0, 1.0)
    """

    input_shape = (1, 8, 8)
    num_classes = 10

    def __init__(self, batch_size: int = 64, validation_size: int = 180, split_seed: int = 0) -> None:
        super().__init__(batch_size, validation_size, split_seed)

    def load(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return 1,437 images and 360 test images, values in [-1, 1]."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
        classes = torch.tensor(digits.target, dtype=torch.int64)
        # the file is ordered by writer and class: without shuffling the test part would be other people's
        order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(0))
        test, rest = order[:360], order[360:]
        return (images[rest], classes[rest]), (images[test], classes[test])
