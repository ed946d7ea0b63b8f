"""What is predicted at test is what the function predicts, and nothing that can't be ends a run."""

import pytest
import torch
from networks import Project, loader, trainer
from torch import nn

from bnnft import predict_accuracy_over_ber
from bnnft.callbacks import AccuracyOverBER, PredictedAccuracyOverBER
from bnnft.nn import BinaryActivation, BinaryConv2d, BinaryLinear

RATES = [0, 0.1, 0.3]


def wide():
    torch.manual_seed(0)
    return nn.Sequential(BinaryLinear(12, 64), nn.BatchNorm1d(64), BinaryActivation(), BinaryLinear(64, 3))


@pytest.mark.filterwarnings("ignore:the prediction is coarse")
@pytest.mark.parametrize("compensation", [None, {}, "thresholds"])
def test_it_is_the_prediction_of_the_function_beside_the_measured_one(tmp_path, compensation):
    module = Project(wide())
    predicted = PredictedAccuracyOverBER(RATES, compensation=compensation)
    runner = trainer(tmp_path, [predicted, AccuracyOverBER(RATES, 2)])
    runner.test(module, loader(), verbose=False)
    expected = predict_accuracy_over_ber(module, loader(), RATES, compensation=compensation or None)
    assert predicted.curve.mean == pytest.approx(expected.mean)
    logged = runner.callback_metrics
    assert float(logged["test/predicted_acc_ber_0p1"]) == pytest.approx(expected.mean[1])
    assert float(logged["test/predicted_acc_ber_0"]) == pytest.approx(float(logged["test/acc_ber_0"]))


@pytest.mark.filterwarnings("ignore:the prediction is coarse")
def test_what_can_not_be_predicted_is_said_once_and_ends_nothing(tmp_path):
    class Images(nn.Sequential):
        def forward(self, x):
            return super().forward(x.view(-1, 1, 3, 4))

    module = Project(Images(BinaryConv2d(1, 8, 2), nn.Flatten(), BinaryLinear(48, 3)))
    predicted = PredictedAccuracyOverBER(RATES)
    runner = trainer(tmp_path, [predicted])
    with pytest.warns(UserWarning, match=r"leaves the prediction out: .* through net.0 \(conv2d\)") as said:
        runner.test(module, loader(), verbose=False)
    assert sum("leaves the prediction out" in str(each.message) for each in said) == 1
    assert predicted.curve is None
    assert not any("predicted" in name for name in runner.callback_metrics)


def test_bad_arguments_raise_at_once():
    with pytest.raises(ValueError, match="rate must be a fraction"):
        PredictedAccuracyOverBER([0, 2])
    with pytest.raises(ValueError, match="kind must be one of"):
        PredictedAccuracyOverBER(compensation="magic")
