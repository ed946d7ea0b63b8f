"""Every file of every group composes to what it names, and every experiment runs."""

import json
import subprocess
import sys
from inspect import Parameter, signature
from pathlib import Path

import pytest
import torch
from commands import QUICK, run
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException
from hydra.utils import get_object, instantiate
from omegaconf import OmegaConf, open_dict

from bnnft import flipped
from bnnft.ber import Independent, PerLayer, Steps
from bnnft.model import FC
from bnnft.train.job import train

ROOT = Path(__file__).parents[1]
GROUPS = ["model", "ber", "ber_schedule", "compensation", "dataset", "loss", "optimizer", "scheduler", "callbacks"]
GROUPS += ["trainer", "logger", "experiment"]
CHOICES = [(group, path.stem) for group in GROUPS for path in sorted((ROOT / "conf" / group).glob("*.yaml"))]
ERRORS = [choice for choice in CHOICES if choice[0] in ("ber", "ber_schedule")]

every_error = pytest.mark.parametrize(("group", "choice"), ERRORS, ids=lambda part: part)


@pytest.fixture
def configured(tmp_path):
    """Composes the job's config as hydra.main does."""

    def build(*overrides):
        given = {"hydra.runtime.output_dir": tmp_path, "data_dir": tmp_path, "logger": "none"}
        given |= dict(override.split("=") for override in overrides)
        return composed(ROOT / "conf", "train", given)

    yield build
    HydraConfig.instance().cfg = None


def composed(folder, name, given):
    with initialize_config_dir(str(folder), version_base="1.3"):
        config = compose(name, [f"{key}={value}" for key, value in given.items()], return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    with open_dict(config):
        del config["hydra"]
    return config


def run_job(config, folder):
    folder.mkdir(exist_ok=True)
    return train(config, OmegaConf.to_container(config, resolve=True), folder, [])[0]


@pytest.mark.parametrize(("group", "choice"), CHOICES, ids=lambda part: part)
def test_every_choice_composes_and_names_what_exists(configured, group, choice):
    """All interpolations resolve, and what the choice names can be built."""
    config = configured(f"{group}={choice}")
    OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    part = config.get(group)
    if group == "model":
        instantiate(part, (1, 28, 28), 10)
    elif group == "callbacks":
        assert all(instantiate(entry) is not None for entry in part.values() if entry)
    elif group not in ("experiment", "logger") and part is not None:
        assert instantiate(part) is not None


@pytest.mark.parametrize("experiment", [choice for group, choice in CHOICES if group == "experiment"])
def test_every_experiment_runs(configured, tmp_path, experiment):
    """With one batch, and on the digits, since other data sets may not be at hand."""
    config = configured(f"experiment={experiment}", "dataset=digits", "trainer.fast_dev_run=true")
    assert 0 <= run_job(config, tmp_path).metrics["test/acc"] <= 1


@every_error
def test_every_error_model_and_schedule_trains_and_evaluates(configured, tmp_path, group, choice):
    """One epoch on the digits: the curve is over the axis of the choice, and begins and falls as it should."""
    config = configured(f"{group}={choice}", "trainer.max_epochs=1", "model.widths=[64,32]", "threads=1")
    result = run_job(config, tmp_path)
    curve, model = result.curve, instantiate(config.ber)
    assert curve.rates == tuple(model.points)
    assert curve.axis == model.axis
    assert curve.clean == pytest.approx(result.metrics["test/acc"])
    if curve.axis in ("voltage", "level"):  # few errors, and at no point none
        assert 0.5 < min(curve.mean) / curve.clean < 1.5
    else:
        assert all(curve.accuracy[0] == curve.clean)
        assert min(curve.mean[1:]) < curve.clean


@every_error
def test_a_choice_of_errors_sets_nothing_outside_of_its_group(configured, group, choice):
    """The composed config differs from that of the default choice in this group alone, and in the choice's name."""
    assert "@package" not in (ROOT / "conf" / group / f"{choice}.yaml").read_text()
    chosen, default = (OmegaConf.to_container(configured(*overrides)) for overrides in ([f"{group}={choice}"], []))
    assert chosen.pop(group) != default.pop(group) or choice in ("independent", "constant")
    assert chosen == default


@every_error
def test_a_choice_of_errors_shows_every_parameter_at_its_default(configured, group, choice):
    part = configured(f"{group}={choice}")[group]
    parameters = signature(get_object(part._target_)).parameters
    assert part.keys() == {"_target_", *parameters}
    defaults = {name: each.default for name, each in parameters.items() if each.default is not Parameter.empty}
    if choice == "chip":  # it stands for one die, where the class without a number is another one in each draw
        assert (part.chip, defaults.pop("chip")) == (0, None)
    if choice == "curriculum":  # shows a schedule of its own
        del defaults["then"]
    assert {name: part[name] for name in defaults} == defaults


@pytest.mark.parametrize("ber", ["sram65", "none"])
def test_callbacks_that_were_left_out_stay_out_whatever_the_errors_are(configured, tmp_path, ber):
    """Without a curve then, and without a checkpoint to choose."""
    few = "callbacks=latent_clamp", "trainer.max_epochs=1", "model.widths=[64,32]", "optimized_metric=test/acc"
    config = configured(f"ber={ber}", *few)
    result = run_job(config, tmp_path)
    assert result.curve is None
    assert result.metrics["test/acc"] > 0.1


def test_no_errors_flip_nothing_and_still_measure_tolerance(configured, tmp_path):
    """A training without the callback that flips gives the same weights, and the same one of them is the best."""
    results = []
    for flips in (True, False):
        folder = tmp_path / str(flips)
        settings = "ber=none", "trainer.max_epochs=2", "model.widths=[64,32]", "threads=1"
        config = configured(*settings, f"hydra.runtime.output_dir={folder}")
        assert instantiate(config.ber) == Independent(0)
        if not flips:
            config.callbacks.bit_flip_training = None
        results.append(run_job(config, folder))
    assert results[0].metrics == results[1].metrics
    assert torch.equal(results[0].curve.accuracy, results[1].curve.accuracy)
    assert results[0].metrics["val/acc_faulty"] == pytest.approx(results[0].metrics["val/acc"])
    assert results[0].curve.rates == (0, 0.01, 0.05, 0.1, 0.15, 0.2, 0.3)


@pytest.mark.parametrize("pattern", ["*fc1*", "*fc2*", "model.fc3", "model.f?1.weight"])
def test_patterns_of_an_override_stand_in_place_of_the_default_ones(configured, pattern):
    config = configured("ber=per_layer", f"ber.rates={{{pattern}: 0.1}}")
    assert instantiate(config.ber) == PerLayer({pattern: 0.1})
    assert instantiate(config.callbacks.bit_flip_training).error_model == PerLayer({pattern: 0.1})


def test_only_the_layers_of_an_override_are_flipped(configured):
    model = instantiate(configured("ber=per_layer", "ber.rates={*fc2*: 0.1}").ber)
    with flipped(FC((1, 8, 8), 10, widths=[64, 32]), model) as flips:
        flipped_layers = [name for name, indices in flips.items() if len(indices)]
    assert list(flips) == ["fc1.weight", "fc2.weight", "fc3.weight"]
    assert flipped_layers == ["fc2.weight"]


def test_steps_of_an_override_stand_in_place_of_the_default_ones(configured):
    config = configured("ber_schedule=steps", "ber_schedule.factors={5: 0.1, 50: 1}")
    assert instantiate(config.ber_schedule) == Steps({5: 0.1, 50: 1})


def test_a_sweep_goes_over_mappings_of_patterns(tmp_path):
    """One job for each mapping, with the layers of this mapping alone."""
    mappings = "ber.rates={*fc1*: 0.1},{*fc2*: 0.2}"
    done = run(tmp_path, "-m", *QUICK, "name=maps", "logger=none", "trainer.max_epochs=1", "ber=per_layer", mappings)
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads(path.read_text()) for path in (tmp_path / "multirun" / "maps").glob("*/metrics.json")]
    assert sorted((result["config"]["ber"]["rates"] for result in results), key=str) == [{"*fc1*": 0.1}, {"*fc2*": 0.2}]


def test_an_unknown_choice_is_hydras_own_error(configured):
    with pytest.raises(ConfigCompositionException, match="Could not find 'ber/cosmic'"):
        configured("ber=cosmic")


PROJECT = """
defaults:
{groups}
  - _self_
hydra:
  searchpath: ["file://{conf}"]
seed: 3
"""


@pytest.mark.parametrize("ber", [choice for group, choice in ERRORS if group == "ber"])
def test_another_project_uses_the_groups_in_any_order(configured, tmp_path, ber):
    """The same callbacks whether the errors come before them or after, and all of them build."""
    choices = {"ber": ber, "ber_schedule": "linear", "callbacks": "[bit_flip_training,accuracy_over_ber]"}
    configs = []
    for number, order in enumerate((choices, reversed(choices))):
        groups = "\n".join(f"  - {group}: {choices[group]}" for group in order)
        (tmp_path / f"project{number}.yaml").write_text(PROJECT.format(groups=groups, conf=ROOT / "conf"))
        config = composed(tmp_path, f"project{number}", {"hydra.runtime.output_dir": tmp_path})
        training, curve = (instantiate(config.callbacks[name]) for name in ("bit_flip_training", "accuracy_over_ber"))
        model = instantiate(config.ber)
        assert training.error_model == curve.error_model == model
        assert (curve.axis, curve.rates) == (model.axis, list(model.points))
        configs.append(OmegaConf.to_container(config, resolve=True))
    assert configs[0] == configs[1]


def test_the_package_ships_the_groups(tmp_path):
    """`hydra.searchpath: [pkg://bnnft.conf]` finds them from another project, where no source tree is at hand."""
    code = "from importlib.resources import files; print((files('bnnft.conf') / 'ber' / 'independent.yaml').is_file())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "True", done.stderr
