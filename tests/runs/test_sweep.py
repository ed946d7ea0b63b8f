"""Sweeps: resumed where they were cut, with a failing job among them, on other launchers, tracked job by job."""

import json
import signal

import pytest
import torch
import yaml
from commands import QUICK, ROOT, run
from kills import killed_and_resumed, uncut
from offline_run import column, read

from bnnft.report.__main__ import main

SMALL = [*QUICK, "callbacks.accuracy_over_ber.rates=[0,0.1,0.3]"]
KILL = "+callbacks.kill._target_=kill_job.Kill"  # does nothing, unless the environment says so
ONE_EPOCH = "trainer.max_epochs=1"
QUIET_RAY = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}  # no token in the home folder, no network
FOUR = ["-m", *SMALL, KILL, "name=four", "ber.rate=0,0.2", "seed=0,1"]


def jobs(folder, name="four"):
    return {path.parent.name: path.parent for path in (folder / "multirun" / name).glob("*/.hydra")}


def weights(job):
    return torch.load(job / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    done = run(folder, *FOUR)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout


def test_a_sweep_says_how_far_it_is_and_ends_with_a_table(whole):
    _, said = whole
    assert "job 1 of 4: " in said
    assert "left for all" in said.split("job 4 of 4: ")[1].splitlines()[0]
    table = said[said.rindex("4 jobs") :]
    assert table.count("finished") == 4
    assert all(f"ber.rate={rate}, seed={seed}" in table for rate in (0, 0.2) for seed in (0, 1))


def test_each_job_is_a_run_of_its_own_with_its_whole_config(whole):
    folder, _ = whole
    runs = [read(path) for path in (folder / "wandb").glob("offline-run-*")]
    assert len(runs) == 4
    settings = {(tracked["config"]["ber"]["rate"], tracked["config"]["seed"]) for tracked in runs}
    assert settings == {(rate, seed) for rate in (0, 0.2) for seed in (0, 1)}
    for tracked in runs:
        assert (tracked["exit"], tracked["group"]) == (0, "four")
        assert f"seed={tracked['config']['seed']}" in tracked["name"]
        job = next(path for name, path in jobs(folder).items() if name == tracked["name"])
        result = json.loads((job / "metrics.json").read_text())
        means = [sum(maps) / len(maps) for maps in result["curve"]["accuracy"]]
        assert column(tracked, "test/acc_over_ber") == pytest.approx(means)


def test_the_same_command_again_finds_everything_done(whole):
    folder, _ = whole
    written = {name: (job / "metrics.json").stat().st_mtime_ns for name, job in jobs(folder).items()}
    done = run(folder, *FOUR)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("finished before: ") == 4
    assert {name: (job / "metrics.json").stat().st_mtime_ns for name, job in jobs(folder).items()} == written
    assert len(list((folder / "wandb").glob("offline-run-*"))) == 4


def test_more_values_add_jobs(whole):
    folder, _ = whole
    done = run(folder, *FOUR[:-2], "ber.rate=0.2,0.3", "seed=1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("finished before: ") == 1
    assert len(jobs(folder)) == 5


def test_a_setting_that_no_folder_is_named_by_makes_a_job_run_again(tmp_path):
    """As when a YAML file was edited."""
    hidden = ["hydra.job.config.override_dirname.exclude_keys=[optimizer.lr]", "ber.rate=0.1", "logger=none"]
    for lr, said in (("1e-3", 0), ("2e-3", 0), ("2e-3", 1)):
        done = run(tmp_path, "-m", *SMALL, ONE_EPOCH, "name=four", *hidden, f"optimizer.lr={lr}")
        assert done.stdout.count("finished before: ") == said
        (job,) = jobs(tmp_path).values()
        assert json.loads((job / "metrics.json").read_text())["config"]["optimizer"]["lr"] == float(lr)


def test_a_sweep_that_was_killed_goes_on_and_ends_as_one_that_was_not(whole, tmp_path):
    """Kill -9 in the third of four jobs, in the middle of a batch, and the same command again.

    Fails if a job that is cut starts afresh with the state of random numbers that is left, or is taken for done.
    """
    done = run(tmp_path, *FOUR, KILL_JOB="ber.rate=0.2")
    assert done.returncode == -signal.SIGKILL
    assert len(jobs(tmp_path)) == 3
    assert sum((job / "metrics.json").exists() for job in jobs(tmp_path).values()) == 2
    done = run(tmp_path, *FOUR)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("finished before: ") == 2
    assert "Restored all states from the checkpoint" in done.stderr + done.stdout
    folder, _ = whole
    for name, job in jobs(tmp_path).items():
        ours, theirs = (json.loads((path / "metrics.json").read_text()) for path in (job, jobs(folder)[name]))
        assert ours["curve"] == theirs["curve"]
        assert ours["metrics"] == theirs["metrics"]
        assert all(torch.equal(value, weights(jobs(folder)[name])[key]) for key, value in weights(job).items())


def test_a_job_that_is_killed_at_any_time_ends_as_one_that_was_not(tmp_path):
    """Each time in a folder of its own; ``python tests/kills.py`` does it a hundred times."""
    whole, seconds = uncut(tmp_path / "whole")
    for share in (0.2, 0.5, 0.8):
        assert killed_and_resumed(tmp_path / str(share), share * seconds)[2] == whole


def test_a_sweep_over_a_voltage_with_an_interpolation_in_an_override(tmp_path):
    """The curve, the table of jobs and the report are over the voltage; the source is in the log of each job."""
    options = ["ber=sram65", "ber.voltage=0.5,0.55", "callbacks.bit_flip_training.error_model=${ber}", "logger=none"]
    done = run(tmp_path, "-m", *QUICK, ONE_EPOCH, "name=volts", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "warn" not in done.stderr.lower()
    assert "job 2 of 2: " in done.stdout
    assert "tolerable voltage (V)" in done.stdout
    for job in jobs(tmp_path, "volts").values():
        assert "from Sun et al." in (job / "train.log").read_text() + done.stdout + done.stderr
    assert main([str(tmp_path / "multirun" / "volts")]) == 0
    header = (tmp_path / "multirun" / "volts" / "report.md").read_text().split("| run ")[1].splitlines()[0]
    assert header.startswith("| clean | 0.5 V | 0.51 V |")
    assert header.endswith("| 0.55 V | tolerable voltage |")


def test_overrides_that_are_too_long_for_the_name_of_a_folder(tmp_path):
    long = f"+note={300 * 'a'}"
    for said in (0, 2):
        done = run(tmp_path, "-m", *SMALL, ONE_EPOCH, "name=long", "logger=none", "seed=0,1", long)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("finished before: ") == said
    folders = jobs(tmp_path, "long")
    assert len(folders) == 2
    assert all(len(name) == 200 for name in folders)


def test_one_failing_job_leaves_the_others_and_its_reason(tmp_path):
    """Those before it and those after it, of which nothing is run again."""
    sweep = ["-m", *SMALL, ONE_EPOCH, "name=four", "optimizer.lr=1e-3,-1,2e-3"]
    done = run(tmp_path, *sweep)
    assert done.returncode == 1
    found = jobs(tmp_path)
    assert sum((job / "metrics.json").exists() for job in found.values()) == 2
    (failed,) = [job for job in found.values() if not (job / "metrics.json").exists()]
    log = (failed / "train.log").read_text()
    assert "Traceback" in log
    assert "Invalid learning rate: -1" in log
    assert sorted(read(path)["exit"] for path in (tmp_path / "wandb").glob("offline-run-*")) == [0, 0, 1]
    table = done.stdout[done.stdout.rindex("3 jobs") :]
    assert table.count("finished") == 2
    assert table.count("failed") == 1
    again = run(tmp_path, *sweep)
    assert again.stdout.count("finished before: ") == 2


@pytest.mark.parametrize(
    "launcher", [["joblib"], ["submitit_local", "threads=1"], ["ray"]], ids=lambda launcher: launcher[0]
)
def test_other_launchers_run_the_same_jobs(whole, tmp_path, launcher):
    """In processes of their own, with the results of one after the other."""
    pytest.importorskip(f"hydra_plugins.hydra_{launcher[0].split('_')[0]}_launcher", reason="an extra of bnnft")
    done = run(tmp_path, *FOUR[:-1], "seed=0", f"hydra/launcher={launcher[0]}", *launcher[1:], **QUIET_RAY)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [path.parent for path in tmp_path.rglob("metrics.json")]
    assert len(found) == 2
    folder, _ = whole
    for job in found:
        rate = json.loads((job / "metrics.json").read_text())["config"]["ber"]["rate"]
        (same,) = [path for name, path in jobs(folder).items() if f"ber.rate={rate:g}," in name and "seed=0" in name]
        ours, theirs = (json.loads((path / "metrics.json").read_text()) for path in (job, same))
        assert ours["curve"] == theirs["curve"]
    exits = [read(path)["exit"] for path in (tmp_path / "wandb").glob("offline-run-*")]
    assert exits == [0, 0]


def test_a_search_finds_the_pareto_set_of_clean_and_faulty_accuracy(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="an extra of bnnft")
    few = ["hydra.sweeper.n_trials=2", "name=search", "logger=none"]
    done = run(tmp_path, "-m", *SMALL, ONE_EPOCH, "hparams_search=clean_vs_faulty", *few)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Number of Pareto solutions" in done.stdout
    found = yaml.safe_load((tmp_path / "multirun" / "search" / "optimization_results.yaml").read_text())
    best = found["solutions"][0]
    results = [json.loads(path.read_text()) for path in tmp_path.rglob("metrics.json")]
    assert len(results) == 2
    values = [[result["metrics"][name] for name in ("val/acc", "val/acc_faulty")] for result in results]
    assert best["values"] in values
    # all trials are measured at one rate, whatever they train with
    rates = {result["config"]["callbacks"]["accuracy_over_ber"]["error_model"]["rate"] for result in results}
    assert rates == {0.1}
    assert len({result["config"]["ber"]["rate"] for result in results}) == 2
    # the same command goes on: it asks for the same trials, and finds those that are done
    written = {path: path.read_bytes() for path in tmp_path.rglob("metrics.json")}
    again = ["hparams_search=clean_vs_faulty", "hydra.sweeper.n_trials=3", *few[1:]]
    done = run(tmp_path, "-m", *SMALL, ONE_EPOCH, *again)
    assert done.stdout.count("finished before: ") == 2
    assert len(list(tmp_path.rglob("metrics.json"))) == 3
    assert all(path.read_bytes() == content for path, content in written.items())


def test_the_sweep_of_wandb_runs_what_its_agent_would(tmp_path):
    """The command line of an agent, with values of the sweep filled in."""
    sweep = yaml.safe_load((ROOT / "conf" / "sweep.yaml").read_text())
    values = {name: entry.get("value", entry.get("values", [None])[-1]) for name, entry in sweep["parameters"].items()}
    values["dataset"] = "digits"  # the other one may not be at hand
    filled = {"${env}": [], "${interpreter}": [], "${program}": []}
    filled["${args_no_hyphens}"] = [f"{name}={value}" for name, value in values.items()]
    arguments = [part for word in sweep["command"] for part in filled.get(word, [word])]
    assert sweep["program"] == "train.py"
    done = run(tmp_path, *SMALL, ONE_EPOCH, *arguments, "logger.wandb.mode=offline")
    assert done.returncode == 0, done.stderr[-3000:]
    (tracked,) = [read(path) for path in (tmp_path / "wandb").glob("offline-run-*")]
    assert tracked["config"]["ber"]["rate"] == values["ber.rate"]
    assert sweep["metric"]["name"] in tracked["summary"]


def test_names_and_paths_in_overrides_stay_in_the_folder_of_sweeps(tmp_path):
    """And a job without overrides has a folder of its own too."""
    few = ["hydra.job.config.override_dirname.exclude_keys=[name,logger,callbacks,trainer.max_epochs,optimized_metric]"]
    few += ["logger=none", "callbacks=latent_clamp", "trainer.max_epochs=1", "optimized_metric=test/acc"]
    before = set(tmp_path.parent.iterdir())
    done = run(tmp_path, "-m", *few, "name=../x", "+note=../../y,/z,null")
    assert done.returncode == 0, done.stderr[-3000:]
    done = run(tmp_path, "-m", *few, "name=plain")
    assert done.returncode == 0, done.stderr[-3000:]
    assert set(tmp_path.parent.iterdir()) == before
    found = sorted(path.parent.relative_to(tmp_path).parts for path in tmp_path.rglob("metrics.json"))
    (sweep,) = {parts[1] for parts in found} - {"plain"}
    assert [parts[:2] for parts in found] == [("multirun", sweep)] * 3 + [("multirun", "plain")]
    assert found[-1] == ("multirun", "plain", "defaults")
    assert all(len(parts) == 3 for parts in found)
