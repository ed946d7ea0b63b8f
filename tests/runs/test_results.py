import json
import math

import torch
from result_folders import config, finish, metrics

from bnnft import BERCurve
from bnnft.runs.results import read_result, write_result


def curve():
    accuracy = torch.tensor([[0.9, 0.9], [0.7, 0.8]], dtype=torch.float64)
    return BERCurve((0.0, 0.1), accuracy, clean=0.9)


def test_what_is_written_is_read(tmp_path):
    write_result(tmp_path, metrics(0.1, 3.0), curve(), {"seed": 3}, seconds=7.5)
    result = read_result(tmp_path)
    assert result.metrics == metrics(0.1, 3.0)
    assert torch.equal(result.curve.accuracy, curve().accuracy)
    assert (result.curve.rates, result.curve.clean, result.curve.axis) == ((0.0, 0.1), 0.9, "rate")
    assert (result.config, result.seconds) == ({"seed": 3}, 7.5)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


def test_the_file_holds_no_more_than_json(tmp_path):
    finish(tmp_path, 0.1, 0)
    (path,) = tmp_path.rglob("metrics.json")
    assert json.loads(path.read_text())["config"] == config(0.1, 0)


def test_several_curves_are_read_by_their_names(tmp_path):
    """In the order that they came in; one without a name is called as in the log where another one has none either."""
    chip = BERCurve((0.1,), [[0.5, 0.6]], 0.9, name="chip")
    loss = BERCurve((0.55, 0.5), [[2.0], [3.0]], 1.5, "voltage", "loss", False, (0, math.inf))
    written = write_result(tmp_path, {}, [curve(), chip, loss], {})
    result = read_result(tmp_path)
    assert list(result.curves) == list(written.curves) == ["", "chip", "loss_over_voltage"]
    for found, expected in zip(result.curves.values(), (curve(), chip, loss), strict=True):
        assert torch.equal(found.values, expected.values)
        assert (found.rates, found.clean, found.axis) == (expected.rates, expected.clean, expected.axis)
        assert (found.score, found.higher_is_better) == (expected.score, expected.higher_is_better)
        assert (found.bounds, found.name) == (expected.bounds, expected.name)
    assert result.curve is result.curves[""]
    assert result.clean == 0.9


def test_no_curve_is_written_and_read_as_none(tmp_path):
    for nothing in (None, []):
        write_result(tmp_path, {"test/acc": 0.7}, nothing, {})
        result = read_result(tmp_path)
        assert (result.curve, result.curves, result.clean) == (None, {}, 0.7)


def test_a_result_of_an_older_version_is_read(tmp_path):
    """It has one curve, of accuracies, and says so nowhere."""
    write_result(tmp_path, metrics(0.1, 3.0), curve(), {"seed": 3})
    content = json.loads((tmp_path / "metrics.json").read_text())
    del content["further_curves"]
    for name in ("score", "higher_is_better", "bounds", "name"):
        del content["curve"][name]
    assert set(content["curve"]) == {"axis", "rates", "accuracy", "clean"}
    (tmp_path / "metrics.json").write_text(json.dumps(content))
    result = read_result(tmp_path)
    assert torch.equal(result.curve.accuracy, curve().accuracy)
    assert (result.curve.score, result.curve.bounds) == ("accuracy", (0, 1))


def test_a_clean_accuracy_is_no_other_score(tmp_path):
    loss = BERCurve((0.1,), [[2.0]], 1.5, score="loss")
    assert write_result(tmp_path, {"test/acc": 0.7}, loss, {}).clean == 0.7
    assert math.isnan(write_result(tmp_path, {}, loss, {}).clean)
