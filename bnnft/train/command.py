"""The command ``bnnft``: ``train.py`` for those who have no checkout."""

from typing import Any

import hydra
from omegaconf import DictConfig


@hydra.main(version_base="1.3", config_path="pkg://bnnft.conf", config_name="train")
def main(config: DictConfig) -> Any:
    """Run one job; returns what a sweeper optimizes."""
    from bnnft.train.job import run_job  # torch and Lightning, once the configuration is composed

    return run_job(config)
