"""Train a binarized neural network under bit flips, test the best checkpoint, and say where everything is."""

import atexit
import sys
import warnings
from pathlib import Path
from typing import Any

import hydra
import rich
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning import seed_everything
from omegaconf import DictConfig, OmegaConf

from bnnft.classifier import Classifier
from bnnft.report import run_tables, write_result

# lightning reads its own containers with a function that torch has renamed: nothing that a user could act on
warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)`")


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(config: DictConfig) -> float:
    """Run one job; returns the value that a sweeper optimizes."""
    loggers: list[Any] = []
    try:
        result, places = train(config, loggers)
    except BaseException as error:
        close(loggers, exit_code=1)
        while isinstance(error, InstantiationException) and error.__cause__ is not None:
            error = error.__cause__
        # after all tracebacks, so that the reason is what the eye falls on
        atexit.register(print, f"train.py failed: {type(error).__name__}: {error}", file=sys.stderr)
        raise
    close(loggers, exit_code=0)
    for table in run_tables(result):
        rich.print(table)
    for name, place in places.items():
        print(f"{name}: {place}")
    return result.metrics[config.optimized_metric]


def train(config: DictConfig, loggers: list[Any]) -> tuple[Any, dict[str, Any]]:
    """Fit and test; returns the result, and the places of what was written."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    resolved = OmegaConf.to_container(config, resolve=True)
    seed_everything(config.seed, workers=True, verbose=False)
    callbacks = [instantiate(entry) for entry in (config.callbacks or {}).values() if entry]
    data = instantiate(config.dataset)
    network = instantiate(config.model, data.input_shape, data.num_classes)
    parts = {part: instantiate(config[part]) for part in ("loss", "optimizer", "scheduler")}
    module = Classifier(network, data.num_classes, **parts)
    loggers += [instantiate(entry) for entry in (config.logger or {}).values() if entry]
    for logger in loggers:
        logger.log_hyperparams(resolved)
    trainer = instantiate(config.trainer, logger=loggers or False, callbacks=callbacks)
    trainer.fit(module, data)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    best = getattr(trainer.checkpoint_callback, "best_model_path", "")
    trainer.test(module, data, ckpt_path=best or None, verbose=False)
    metrics |= {name: float(value) for name, value in trainer.callback_metrics.items()}
    curve = next((callback.curve for callback in callbacks if hasattr(callback, "curve")), None)
    wandb = next((Path(logger.experiment.dir).parent for logger in loggers if hasattr(logger.experiment, "finish")), "")
    places = {"checkpoint": best, "results and figures": folder, "W&B run": wandb}
    return write_result(folder, metrics, curve, resolved), {name: place for name, place in places.items() if place}


def close(loggers: list[Any], exit_code: int) -> None:
    """End each W&B run as finished or failed: otherwise the jobs of a sweep would write into one."""
    for logger in loggers:
        finish = getattr(logger.experiment, "finish", None)
        if finish is not None:
            finish(exit_code=exit_code)


if __name__ == "__main__":
    main()
