"""What a job of a sweep costs, in units of the same training without Hydra's sweep and without W&B.

    python tests/benchmarks/bench_sweep.py

The training is that of ``python train.py`` on the digits, on one thread, for three seeds in one process each time.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
SEEDS = (0, 1, 2)
ALONE = """
import sys, time
from pathlib import Path
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf, open_dict
from bnnft.train.job import train
for seed in {seeds}:
    folder = str(Path("alone").absolute() / str(seed))
    Path(folder).mkdir(parents=True)
    with initialize_config_dir({conf!r}, version_base="1.3"):
        overrides = [f"hydra.runtime.output_dir={{folder}}", f"seed={{seed}}", "logger=none"]
        config = compose("train", overrides, return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    with open_dict(config):
        del config["hydra"]
    train(config, OmegaConf.to_container(config, resolve=True), Path(folder), [])
"""


def seconds(*command):
    """Return how long a command takes in a folder of its own, without what its start takes."""
    with tempfile.TemporaryDirectory() as folder:
        quiet = {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "WANDB_DATA_DIR": folder, "PYTHONPATH": str(ROOT)}
        start = time.perf_counter()
        subprocess.run([sys.executable, *command], cwd=folder, env=os.environ | quiet, check=True, capture_output=True)
        return time.perf_counter() - start


def main():
    start = seconds("-c", "import bnnft.train.job")
    alone = seconds("-c", ALONE.format(seeds=SEEDS, conf=str(ROOT / "conf"))) - start
    sweep = [str(ROOT / "train.py"), "-m", "seed=" + ",".join(map(str, SEEDS))]
    print(f"start of python and imports {start:.1f} s; a training {alone / len(SEEDS):.1f} s")
    for logger in ("none", "wandb"):
        job = seconds(*sweep, f"logger={logger}") - start
        print(f"job of a sweep, logger={logger:<5}  {job / alone:.2f}")


if __name__ == "__main__":
    main()
