import pytest
import torch
from result_folders import finish, finish_with, sweep
from scipy.stats import t

from bnnft import BERCurve
from bnnft.report.groups import grouping, in_groups, pooled, settings_of, varied
from bnnft.runs.curves import kind_of
from bnnft.runs.job import read_jobs


def test_settings_are_those_of_the_command_line(tmp_path):
    jobs, _ = read_jobs([sweep(tmp_path)])
    assert settings_of(jobs)[0] == {"ber.rate": "0.0", "seed": "0", "dataset": "digits"}
    assert varied(settings_of(jobs)) == ["ber.rate", "seed"]


def test_a_run_that_was_not_told_a_setting_has_that_of_its_config(tmp_path):
    finish(tmp_path, 0.1, 0)
    finish(tmp_path, 0.1, 1, loss="hinge")
    settings = settings_of(read_jobs([tmp_path])[0])
    assert [own["loss"] for own in settings] == ["", "hinge"]
    assert varied(settings) == ["seed", "loss"]


def test_several_sweeps_differ_by_their_name(tmp_path):
    jobs, _ = read_jobs([sweep(tmp_path / "a", rates=(0.1,)), sweep(tmp_path / "b", rates=(0.1,))])
    assert varied(settings_of(jobs)) == ["sweep", "seed"]


@pytest.mark.parametrize(
    ("key", "groups"),
    [(None, ["0.0", "0.05", "0.1", "0.2"]), ("seed", ["0", "1", "2"]), ("loss._target_", ["cross_entropy"])],
)
def test_groups_are_those_of_any_setting_in_order(tmp_path, key, groups):
    jobs, _ = read_jobs([sweep(tmp_path)])
    _, values = grouping(jobs, key)
    assert [value for value, _ in in_groups(jobs, values)] == groups


def test_an_unknown_setting_is_named_with_those_there_are(tmp_path):
    jobs, _ = read_jobs([sweep(tmp_path)])
    with pytest.raises(ValueError, match=r"--group-by must be .* got 'los'; there are ber\.rate, seed, loss"):
        grouping(jobs, "los")


def test_a_group_of_runs_has_the_spread_over_runs(tmp_path):
    """Mean and Student's interval over the runs' means; of a single run over its maps."""
    results = [finish(tmp_path, 0.1, seed) for seed in range(4)]
    rates, means, intervals = pooled(results)
    values = torch.stack([result.curve.accuracy[3].mean() for result in results])
    assert rates[3] == 0.09
    assert means[3] == pytest.approx(float(values.mean()))
    half = t.ppf(0.975, 3) * float(values.std()) / 2
    assert intervals[3] == pytest.approx((means[3] - half, means[3] + half))
    _, alone, interval = pooled(results[:1])
    assert (alone[3], interval[3]) == (
        pytest.approx(results[0].curve.mean[3]),
        pytest.approx(results[0].curve.interval[3]),
    )


def test_runs_with_other_rates_share_a_figure(tmp_path):
    results = [finish(tmp_path, 0.1, 0, rates=3), finish(tmp_path, 0.1, 1, rates=5)]
    rates, means, _ = pooled(results)
    assert rates == [0.0, 0.03, 0.06, 0.09, 0.12]
    assert means[4] == pytest.approx(results[1].curve.mean[4])


def test_intervals_of_groups_stay_within_the_bounds_of_the_score(tmp_path):
    """Means of two runs, 0.9 and 0.1: Student's t alone goes from -4.6 to 5.6."""
    curves = [BERCurve((0.1,), [[mean]], 0.9) for mean in (0.9, 0.1)]
    results = [finish_with(tmp_path, 0.1, seed, [curve]) for seed, curve in enumerate(curves)]
    assert pooled(results)[2] == [(0.0, 1.0)]
    free = [BERCurve((0.1,), [[mean]], 0.9, score="loss") for mean in (0.9, 0.1)]
    results = [finish_with(tmp_path, 0.2, seed, [curve]) for seed, curve in enumerate(free)]
    assert pooled(results) == ([], [], [])  # no accuracy
    assert pooled(results, kind_of("", free[0]))[2][0] == pytest.approx((-4.582, 5.582), abs=1e-3)
