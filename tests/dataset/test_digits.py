import pytest
import torch
from sklearn.datasets import load_digits

from bnnft.dataset import Digits
from bnnft.nn.integers import on_grid


def ready(**kwargs):
    data = Digits(**kwargs)
    data.setup("fit")
    return data


def test_every_digit_is_in_one_split_with_its_class():
    """Images are scaled from [0, 16] to [-1, 1]; some of the 1,797 images might be equal, so rows are counted."""
    data, digits = ready(), load_digits()
    splits = [data._splits[split] for split in ("train", "val", "test")]
    assert [len(split) for split in splits] == [1257, 180, 360]
    rows = torch.cat([torch.cat([s.inputs.flatten(1), s.targets[:, None].float()], 1) for s in splits])
    expected = torch.cat([torch.tensor(digits.data) / 8 - 1, torch.tensor(digits.target)[:, None]], 1).float()
    assert sorted(rows.tolist()) == sorted(expected.tolist())


def test_what_is_known_of_the_data_is_what_the_data_are():
    data = ready(batch_size=360)
    ((images, classes),) = data.test_dataloader()
    assert images.shape[1:] == data.input_shape
    assert images.dtype == torch.float32
    assert classes.dtype == torch.int64
    assert set(classes.tolist()) == set(range(data.num_classes))
    assert on_grid(images) is not None  # so that the first layer computes in integers


def test_the_test_images_are_always_the_same_and_shuffled_over_the_file():
    """The file is ordered by writer: a tail of it would be other people's digits."""
    one, other = ready(), ready(split_seed=1, validation_size=99)
    assert torch.equal(one._splits["test"].inputs, other._splits["test"].inputs)
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))[:360]
    assert one._splits["test"].targets.tolist() == load_digits().target[order].tolist()


def test_defaults_are_the_documented_ones():
    data = Digits()
    assert (data.batch_size, data.validation_size, data.split_seed) == (64, 180, 0)


def test_a_validation_part_as_large_as_the_data_is_refused():
    with pytest.raises(ValueError, match="validation_size must be below the 1437 training samples, got 1437"):
        ready(validation_size=1437)
