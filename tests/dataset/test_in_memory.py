import pytest
import torch

from bnnft.dataset.in_memory import InMemoryDataModule, ShuffledByEpoch


class Numbers(InMemoryDataModule):
    """Samples that say which they are: 0 to 19 to train, 100 to 106 to test; the target is ten times the input."""

    input_shape, num_classes = (1,), 2

    def __init__(self, batch_size=4, validation_size=5, split_seed=0):
        super().__init__(batch_size, validation_size, split_seed)
        self.loads = 0

    def load(self):
        self.loads += 1
        return tuple((numbers[:, None].float(), 10 * numbers) for numbers in (torch.arange(20), torch.arange(100, 107)))


def ready(**kwargs):
    data = Numbers(**kwargs)
    data.setup("fit")
    return data


def samples(loader):
    """The samples in their order, each with its own target."""
    batches = list(loader)
    assert all(torch.equal(targets, 10 * inputs.squeeze(1).long()) for inputs, targets in batches)
    return [int(number) for inputs, _ in batches for number in inputs]


def test_splits_are_disjoint_and_complete_and_fixed_by_the_seed():
    one, same, other = ready(), ready(), ready(split_seed=1)
    train, val = samples(one.train_dataloader()), samples(one.val_dataloader())
    assert len(val) == 5
    assert sorted(train + val) == list(range(20))
    assert samples(same.val_dataloader()) == val != samples(other.val_dataloader())
    assert sorted(val) != list(range(5))
    assert sorted(val) != list(range(15, 20))


def test_only_training_data_are_shuffled():
    data = ready(validation_size=1)
    assert samples(data.test_dataloader()) == samples(data.predict_dataloader()) == list(range(100, 107))
    assert samples(data.val_dataloader()) == samples(data.val_dataloader())
    assert samples(data.train_dataloader()) != sorted(samples(data.train_dataloader()))


def test_batches_come_whole_and_the_last_one_as_large_as_what_is_left():
    data = ready()
    assert [len(targets) for _, targets in data.train_dataloader()] == [4, 4, 4, 3]
    assert [len(targets) for _, targets in data.test_dataloader()] == [4, 3]
    assert data.train_dataloader().num_workers == 0


def test_single_samples_are_those_of_the_batches():
    split = ready()._splits["test"]
    inputs, target = split[3]
    assert (inputs.tolist(), int(target)) == ([103.0], 1030)
    assert [part.tolist() for part in split.__getitems__([3, 0])] == [[[103.0], [100.0]], [1030, 1000]]


def test_the_data_are_loaded_once():
    data = ready()
    data.setup("test")
    assert data.loads == 1


def test_the_order_of_an_epoch_depends_on_the_seed_and_the_epoch_alone():
    """Not on what was drawn from torch's generator since: a run that resumes has the order of one that was not cut."""

    def order(seed, epoch, draws=0):
        torch.manual_seed(seed)
        loader = ready().train_dataloader()
        torch.rand(draws)
        loader.sampler.set_epoch(epoch)
        return samples(loader)

    assert order(0, 3) == order(0, 3, draws=5)
    orders = {tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_the_order_does_not_repeat_the_random_numbers_of_initial_weights():
    """A permutation from the seed itself would be drawn of the numbers that the weights were drawn of."""
    naive = torch.randperm(50, generator=torch.Generator().manual_seed(7)).tolist()
    assert list(ShuffledByEpoch(50, seed=7)) != naive
    assert sorted(ShuffledByEpoch(50, seed=7)) == list(range(50))


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"validation_size": 0}, {"batch_size": -1}], ids=str)
def test_sizes_are_at_least_one(wrong):
    with pytest.raises(ValueError, match="batch_size and validation_size must be at least 1, got"):
        Numbers(**wrong)


def test_some_data_must_be_left_to_train():
    assert len(samples(ready(validation_size=19).train_dataloader())) == 1
    with pytest.raises(ValueError, match="validation_size must be below the 20 training samples, got 20"):
        ready(validation_size=20)
