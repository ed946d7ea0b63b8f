import pytest
import torch
from networks import equal_states, loader, small_net, state, trainer
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from bnnft.classifier import Classifier, sample_losses


def test_it_logs_loss_and_accuracy_of_the_whole_epoch(tmp_path):
    """Also where the last batch is smaller."""
    module = Classifier(small_net(), 3)
    run = trainer(tmp_path, [])
    run.test(module, loader(batch_size=32), verbose=False)
    x, y = loader(batch_size=48).dataset.tensors
    scores = module.model.eval()(x)
    assert float(run.callback_metrics["test/acc"]) == pytest.approx(float((scores.argmax(1) == y).float().mean()))
    expected = float(nn.functional.cross_entropy(scores, y).detach())
    assert float(run.callback_metrics["test/loss"]) == pytest.approx(expected, rel=1e-5)


def test_optimizer_and_scheduler_are_the_given_ones(tmp_path):
    def optimizer(parameters):
        return torch.optim.SGD(parameters, lr=0.5)

    def scheduler(optimizer, steps):
        assert steps == 12
        return torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=steps)

    module = Classifier(small_net(), 3, optimizer=optimizer, scheduler=scheduler)
    run = trainer(tmp_path, [])
    run.fit(module, loader())
    assert isinstance(run.optimizers[0], torch.optim.SGD)
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.005)


class MeanSquares(nn.Module):
    """A loss without the argument `reduction`."""

    def forward(self, scores, targets):
        return (scores - nn.functional.one_hot(targets, 3)).square().mean()


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(label_smoothing=0.1), nn.MultiMarginLoss(), MeanSquares()])
def test_losses_of_samples_have_the_batch_loss_as_mean(loss):
    module = Classifier(small_net(), 3, loss=loss).eval()
    batch = next(iter(loader()))
    before = state(module)
    losses = sample_losses(module, batch)
    assert losses.shape == (8,)
    assert torch.allclose(losses.mean(), loss(module(batch[0]), batch[1]))
    assert equal_states(before, state(module))


def test_without_a_choice_it_is_adam_at_a_constant_rate_of_a_thousandth(tmp_path):
    module = Classifier(small_net(), 3)
    run = trainer(tmp_path, [])
    run.fit(module, loader())
    assert type(run.optimizers[0]) is torch.optim.Adam
    assert run.optimizers[0].param_groups[0]["lr"] == 1e-3
    assert run.lr_scheduler_configs == []


def test_it_trains_as_a_plain_loop(tmp_path):
    ours, reference = Classifier(small_net(), 3), small_net()
    trainer(tmp_path, [], max_epochs=1).fit(ours, loader())
    optimizer = torch.optim.Adam(reference.parameters())
    for x, y in loader():
        optimizer.zero_grad()
        nn.functional.cross_entropy(reference(x), y).backward()
        optimizer.step()
    assert equal_states(state(ours.model), state(reference))


def test_it_predicts_the_class_of_the_best_score(tmp_path):
    module = Classifier(small_net(), 3)
    predicted = torch.cat(trainer(tmp_path, []).predict(module, loader()))
    assert torch.equal(predicted, module.model.eval()(loader().dataset.tensors[0]).argmax(1))


def test_validation_logs_what_a_plain_loop_counts(tmp_path):
    module, run = Classifier(small_net(), 3, loss=nn.MultiMarginLoss()), trainer(tmp_path, [])
    run.validate(module, loader(batch_size=32), verbose=False)
    x, y = loader().dataset.tensors
    scores = module.model.eval()(x).detach()
    assert float(run.callback_metrics["val/acc"]) == pytest.approx(float((scores.argmax(1) == y).float().mean()))
    assert float(run.callback_metrics["val/loss"]) == pytest.approx(float(nn.MultiMarginLoss()(scores, y)), rel=1e-5)


def test_a_scheduler_that_needs_the_number_of_steps_refuses_a_loader_without_length(tmp_path):
    class Endless(IterableDataset):
        def __iter__(self):
            while True:
                yield torch.ones(12), 0

    module = Classifier(small_net(), 3, scheduler=lambda optimizer, steps: None)
    with pytest.raises(ValueError, match=r"the loader has no length.*set max_steps of the trainer"):
        trainer(tmp_path, [], max_epochs=1).fit(module, DataLoader(Endless(), batch_size=2))
