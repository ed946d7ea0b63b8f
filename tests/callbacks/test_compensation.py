"""Steps run compensated, nothing else does, and nothing stays."""

import pytest
import torch
from networks import Project, equal_states, loader, small_net, state, trainer
from torch.nn.functional import cross_entropy

from bnnft import compensated, flipped
from bnnft.ber import Asymmetric
from bnnft.callbacks import AccuracyOverBER, BitFlipTraining, Compensation
from bnnft.compensation import Method


class Answers(Project):
    def __init__(self):
        super().__init__(small_net())
        self.answers = []

    def test_step(self, batch, batch_idx):
        self.answers.append(self(batch[0]))

    def predict_step(self, batch, batch_idx):
        return self(batch[0])


@pytest.mark.parametrize("kind", ["thresholds", "auto"])
def test_test_and_predict_steps_are_those_of_the_context(tmp_path, kind):
    module, errors = Answers(), Asymmetric(0, 0.2)
    before, callback = state(module), Compensation(errors, kind)
    runner = trainer(tmp_path, [callback])
    with flipped(module, errors, seed=1):
        runner.test(module, loader(), verbose=False)
        predicted = torch.cat(runner.predict(module, loader()))
    module.eval()
    with torch.no_grad(), flipped(module, errors, seed=1), compensated(module, errors, kind):
        expected = torch.cat([module(x) for x, _ in loader()])
    assert torch.equal(torch.cat(module.answers), expected)
    assert torch.equal(predicted, expected)
    assert equal_states(state(module), before)
    assert "test_step" not in vars(module)


@pytest.mark.parametrize("first", [True, False])
def test_curves_beside_it_are_not_compensated_twice(tmp_path, first):
    module = Answers()
    curve = AccuracyOverBER([0.2], 2, compensation="thresholds")
    alone = AccuracyOverBER([0.2], 2, compensation="thresholds")
    pair = [Compensation(0.2), curve]
    trainer(tmp_path, pair if first else pair[::-1]).test(module, loader(), verbose=False)
    trainer(tmp_path, [alone]).test(module, loader(), verbose=False)
    assert torch.equal(curve.curve.values, alone.curve.values)


def test_statistics_of_a_training_with_flips_are_known_in_its_test(tmp_path):
    """The curve is that of an argument that says it."""
    module, known = Project(), AccuracyOverBER([0, 0.2], 2, compensation="thresholds", name="known")
    told = AccuracyOverBER([0, 0.2], 2, compensation=Method("thresholds", gathered_at=0.2), name="told")
    clean = AccuracyOverBER([0, 0.2], 2, compensation=Method("thresholds", gathered_at=0), name="clean")
    runner = trainer(tmp_path, [BitFlipTraining(0.2), known, told, clean])
    runner.fit(module, loader())
    runner.test(module, loader(), verbose=False)
    assert torch.equal(known.curve.values, told.curve.values)
    assert not torch.equal(known.curve.values, clean.curve.values)


def test_an_error_in_a_step_leaves_the_module_alone(tmp_path):
    class Fails(Answers):
        def test_step(self, batch, batch_idx):
            cross_entropy(self(batch[0]), batch[1])
            raise RuntimeError("mine")

    module = Fails()
    with pytest.raises(RuntimeError, match="mine"):
        trainer(tmp_path, [Compensation(0.1)]).test(module, loader(), verbose=False)
    assert "test_step" not in vars(module)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2,), "rate must be a fraction"),
        ((0.1, "magic"), "kind must be one of"),
        ((0.1, "recalibration"), "recalibration needs data="),
    ],
)
def test_bad_arguments_raise_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        Compensation(*arguments)
