"""Train a binarized neural network under bit flips, test the best checkpoint, and say where everything is."""

from pathlib import Path

import hydra

from bnnft.train.command import task

CONF = Path(__file__).parent.absolute() / "conf"  # of this checkout

if __name__ == "__main__":
    hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")(task)()
