"""What is run for each composed configuration, and the command ``bnnft``: ``train.py`` for those without a checkout."""

from typing import Any

import hydra
from omegaconf import DictConfig


def task(config: DictConfig) -> Any:
    """Run one job; returns what a sweeper optimizes."""
    from bnnft.train.job import run_job  # torch and Lightning, once the configuration is composed

    return run_job(config)


main = hydra.main(version_base="1.3", config_path="pkg://bnnft.conf", config_name="train")(task)
