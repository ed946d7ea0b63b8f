"""One job: train a network under bit flips, test the best checkpoint, and say where everything is."""

import gc
import os
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import rich
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import setup_globals
from hydra.utils import instantiate
from lightning import seed_everything
from omegaconf import DictConfig, OmegaConf
from torch import nn

from bnnft.callbacks import Objective
from bnnft.classifier import Classifier
from bnnft.injection.sites import binarized_weights
from bnnft.loggers import quiet
from bnnft.runs.job import fail_job, reason_of, run_of, running, whole_checkpoint
from bnnft.runs.results import Result, write_result
from bnnft.runs.stopping import stoppable
from bnnft.runs.tables import run_tables
from bnnft.train.tracking import (
    built_loggers,
    define_summaries,
    describe,
    finished,
    keep_results,
    summarize,
    wandb_folder,
)

# lightning reads its own containers with a function that torch has renamed: nothing that a user could act on
warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)`")
# nor is that a job of Hydra's launcher, or one beside Slurm, was not started by srun
warnings.filterwarnings("ignore", message="The `srun` command is available on your system but is not used")


def run_job(config: DictConfig) -> float | tuple[float, ...]:
    """Run one job, or find it done; returns what a sweeper optimizes."""
    setup_globals()  # for ${hydra:...}, which --experimental-rerun does not know without
    folder = Path(HydraConfig.get().runtime.output_dir)
    settings: Any = OmegaConf.to_container(config, resolve=True)
    loggers: list[Any] = []
    with running(folder, settings) as before, finished(loggers, reason_of), stoppable(partial(fail_job, folder)):
        result, places = (before, {"finished before": folder}) if before else train(config, settings, folder, loggers)
        objective = result.objective(config.optimized_metric)
    gc.collect()  # trainer and module refer to each other: they go before the next job of a sweep comes
    for table in run_tables(result) if "checkpoint" in places else []:
        rich.print(table)
    print("\n".join(f"{name}: {place}" for name, place in places.items() if place))
    return objective


def train(config: DictConfig, settings: Any, folder: Path, loggers: list[Any]) -> tuple[Result, dict[str, Any]]:
    """Fit, from where a cut run of the same config left off, and test; returns result and places of what is written."""
    start = time.perf_counter()
    if not config.verbose:
        quiet()
    torch.set_num_threads(config.threads or torch.get_num_threads())
    seed_everything(config.seed, workers=True, verbose=False)
    run, starts = run_of(folder)
    loggers += built_loggers(config.logger, config.name, run)
    describe(loggers, settings, folder, starts)  # before all else that may fail, so that a failed job is tracked
    callbacks = [instantiate(entry) for entry in (config.callbacks or {}).values() if entry and "_target_" in entry]
    callbacks.append(objective := Objective(config.optimized_metric))
    data = instantiate(config.dataset)
    network = instantiate(config.model, data.input_shape, data.num_classes)
    parts = {part: instantiate(config[part]) for part in ("loss", "optimizer", "scheduler")}
    module = Classifier(network, data.num_classes, **parts)
    summary = {"enable_model_summary": config.verbose}
    trainer = instantiate(config.trainer, logger=loggers or False, callbacks=callbacks, **summary)
    checkpoint = trainer.checkpoint_callback
    define_summaries(loggers, {checkpoint.monitor: checkpoint.mode} if getattr(checkpoint, "monitor", None) else {})
    trainer.fit(module, data, ckpt_path=whole_checkpoint(folder))
    best = getattr(checkpoint, "best_model_path", "")
    # of what is tested, which is not what training ended with
    metrics = dict(getattr(checkpoint, "best_metrics", {}) if best else trainer.callback_metrics)
    validated = metrics and metrics.keys() >= {*objective.validated}
    for evaluate in [trainer.test] if validated else [trainer.validate, trainer.test]:
        evaluate(module, data, ckpt_path=best or None, verbose=False)
        metrics |= trainer.callback_metrics
    curves = [callback.curve for callback in callbacks if getattr(callback, "curve", None) is not None]
    result = write_result(folder, metrics, curves, settings, time.perf_counter() - start)
    summarize(loggers, sizes(network) | found_best(checkpoint, folder))
    keep_results(loggers, folder, settings)
    return result, {"checkpoint": best, "results and figures": folder, "W&B run": wandb_folder(loggers)}


def sizes(network: nn.Module) -> dict[str, int]:
    """Return the numbers of stored bits and of all parameters."""
    bits = sum(weight.numel() for weight in binarized_weights(network).values())
    return {"bits": bits, "parameters": sum(parameter.numel() for parameter in network.parameters())}


def found_best(checkpoint: Any, folder: Path) -> dict[str, Any]:
    """Return value, step, epoch and path, within the folder, of the best checkpoint, if there is one."""
    if not getattr(checkpoint, "best_model_path", ""):
        return {}
    place = os.path.relpath(checkpoint.best_model_path, folder)
    score = {} if checkpoint.monitor is None else {f"best/{checkpoint.monitor}": float(checkpoint.best_model_score)}
    return (
        {"best/checkpoint": place}
        | score
        | {f"best/{name}": number for name, number in getattr(checkpoint, "best_at", {}).items()}
    )
