import pytest
import torch

from bnnft.dataset import Digits


def indices(data, split):
    """Rows of a split as a set, to compare splits by content."""
    return {bytes(row.numpy()) for row in data._splits[split].inputs.flatten(1)}


def ready(**kwargs):
    data = Digits(**kwargs)
    data.setup("fit")
    return data


def test_splits_are_disjoint_complete_and_fixed_by_the_seed():
    one, same, other = ready(), ready(), ready(split_seed=1)
    sizes = [len(one._splits[split]) for split in ("train", "val", "test")]
    assert sizes == [1257, 180, 360]
    assert torch.equal(one._splits["val"].inputs, same._splits["val"].inputs)
    assert not torch.equal(one._splits["val"].inputs, other._splits["val"].inputs)
    assert torch.equal(one._splits["test"].inputs, other._splits["test"].inputs)
    assert not indices(one, "train") & indices(one, "val")


def test_batches_come_whole_and_cover_every_sample_once():
    data = ready(batch_size=100)
    batches = list(data.train_dataloader())
    assert [len(y) for _, y in batches] == [100] * 12 + [57]
    images = torch.cat([x for x, _ in batches])
    assert images.sort(0).values.sum() == pytest.approx(float(data._splits["train"].inputs.sum()), rel=1e-4)
    assert {bytes(row.numpy()) for row in images.flatten(1)} == indices(data, "train")


def test_training_data_are_shuffled_and_the_rest_is_not():
    data, first = ready(), []
    for epoch in range(2):
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        first.append(next(iter(loader))[1])
    assert not torch.equal(*first)
    assert torch.equal(*[next(iter(data.val_dataloader()))[1] for _ in range(2)])


def test_the_order_of_an_epoch_depends_on_the_seed_and_the_epoch_alone():
    """Not on what was drawn from torch's generator since: a run that resumes has the order of one that was not cut."""

    def order(seed, draws):
        torch.manual_seed(seed)
        loader = ready().train_dataloader()
        torch.rand(draws)
        loader.sampler.set_epoch(3)
        return torch.cat([y for _, y in loader])

    assert torch.equal(order(0, draws=0), order(0, draws=5))
    assert not torch.equal(order(0, draws=0), order(1, draws=0))


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"validation_size": 0}])
def test_sizes_are_at_least_one(wrong):
    with pytest.raises(ValueError, match="must be at least 1"):
        Digits(**wrong)


def test_a_validation_part_as_large_as_the_data_is_refused():
    with pytest.raises(ValueError, match="validation_size must be below the 1437 training samples, got 1437"):
        ready(validation_size=1437)
