"""Every file of every group composes to what it names, and every experiment runs."""

import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException
from hydra.utils import instantiate
from omegaconf import OmegaConf, open_dict

import train

ROOT = Path(train.__file__).parent
GROUPS = ["model", "ber", "ber_schedule", "dataset", "loss", "optimizer", "scheduler", "callbacks", "trainer"]
GROUPS += ["logger", "experiment"]
CHOICES = [(group, path.stem) for group in GROUPS for path in sorted((ROOT / "conf" / group).glob("*.yaml"))]


@pytest.fixture
def configured(tmp_path):
    """Composes the job's config as hydra.main does."""

    def build(*overrides):
        given = {"hydra.runtime.output_dir": tmp_path, "data_dir": tmp_path, "logger": "none"}
        given |= dict(override.split("=") for override in overrides)
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            config = compose("train", [f"{key}={value}" for key, value in given.items()], return_hydra_config=True)
        HydraConfig.instance().set_config(config)
        with open_dict(config):
            del config["hydra"]
        return config

    yield build
    HydraConfig.instance().cfg = None


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
    settings = OmegaConf.to_container(config, resolve=True)
    result, _ = train.train(config, settings, tmp_path, [])
    assert 0 <= result.metrics["test/acc"] <= 1


@pytest.mark.parametrize(("group", "choice"), [c for c in CHOICES if c[0] in ("ber", "ber_schedule")], ids=lambda p: p)
def test_every_error_model_and_schedule_trains_and_evaluates(configured, tmp_path, group, choice):
    """One epoch on the digits: the curve is over the axis of the choice, and begins and falls as it should."""
    config = configured(f"{group}={choice}", "trainer.max_epochs=1", "model.widths=[64,32]", "threads=1")
    result, _ = train.train(config, OmegaConf.to_container(config, resolve=True), tmp_path, [])
    curve, settings = result.curve, config.callbacks.accuracy_over_ber
    assert curve.rates == tuple(settings.rates)
    assert curve.axis == settings.axis
    assert curve.clean == pytest.approx(result.metrics["test/acc"])
    if settings.axis in ("voltage", "level"):  # few errors, and at no point none
        assert 0.5 < min(curve.mean) / curve.clean < 1.5
    else:
        assert all(curve.accuracy[0] == curve.clean)
        assert min(curve.mean[1:]) < curve.clean


@pytest.mark.parametrize("ber", ["sram65", "none"])
def test_callbacks_that_were_left_out_stay_out_whatever_a_choice_sets_of_them(configured, tmp_path, ber):
    """Without a curve then, and without a checkpoint to choose."""
    config = configured(f"ber={ber}", "callbacks=latent_clamp", "trainer.max_epochs=1", "model.widths=[64,32]")
    result, _ = train.train(config, OmegaConf.to_container(config, resolve=True), tmp_path, [])
    assert result.curve is None
    assert result.metrics["test/acc"] > 0.1


def test_no_flips_still_measures_tolerance(configured):
    config = configured("ber=none")
    assert config.callbacks.bit_flip_training is None
    assert config.callbacks.model_checkpoint.monitor == config.optimized_metric == "val/acc"
    assert config.callbacks.accuracy_over_ber.error_model is None


def test_an_unknown_choice_is_hydras_own_error(configured):
    with pytest.raises(ConfigCompositionException, match="Could not find 'ber/cosmic'"):
        configured("ber=cosmic")


def test_the_package_ships_the_groups(tmp_path):
    """`hydra.searchpath: [pkg://bnnft.conf]` finds them from another project, where no source tree is at hand."""
    code = "from importlib.resources import files; print((files('bnnft.conf') / 'ber' / 'independent.yaml').is_file())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "True", done.stderr
