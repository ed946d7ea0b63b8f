"""Fashion-MNIST: 70,000 images of clothes, 28x28."""

import gzip
import hashlib
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from bnnft.dataset.in_memory import InMemoryDataModule

_RAW = Path("FashionMNIST", "raw")
_FILES = [f"{part}-{content}-ubyte" for part in ("train", "t10k") for content in ("images-idx3", "labels-idx1")]
_DEBIAN = Path("/usr/share/datasets/fashion-mnist")
_CONTENT = "14410854cf7a289477dcfc7df3f8ec24741e281cdcc425ede0d9a748ca630214"  # of the files of Debian's package


class FashionMNIST(InMemoryDataModule):
    """Fashion-MNIST: 55,000 images to train, 5,000 to validate, 10,000 to test.

    The files are looked for in ``data_dir`` (as torchvision lays them out, or the four IDX files themselves,
    packed by gzip or not), then where Debian's package ``dataset-fashion-mnist`` puts them, and only then
    downloaded.

    Args:
        data_dir: folder for data sets.
        batch_size: samples in a batch.
        validation_size: samples held out of the 60,000 training images.
        split_seed: of the split into training and validation.

    Raises:
        FileNotFoundError: no files found and none could be downloaded.

    Source: Xiao, Rasul, Vollgraf 2017, arXiv 1708.07747.
    """

    input_shape = (1, 28, 28)
    num_classes = 10

    def __init__(
        self, data_dir: str = "data", batch_size: int = 128, validation_size: int = 5000, split_seed: int = 0
    ) -> None:
        super().__init__(batch_size, validation_size, split_seed)
        self.data_dir = Path(data_dir)

    @staticmethod
    def content(data_dir: str) -> str:
        """Return a hash of the data that a folder holds, that of the usual files where it holds none yet."""
        found = _files_in(Path(data_dir) / _RAW) or _files_in(Path(data_dir))
        if not found:
            return _CONTENT
        digest = hashlib.sha256()
        for path in found:
            digest.update(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes())
        return digest.hexdigest()

    def prepare_data(self) -> None:
        """Put the files where torchvision reads them."""
        from torchvision.datasets import FashionMNIST as Reader

        raw = self.data_dir / _RAW
        if _files_in(raw):
            return
        for source in (self.data_dir, _DEBIAN):
            if found := _files_in(source):
                _unpack(found, raw)
                return
        try:
            Reader(str(self.data_dir), download=True)
        except Exception as error:
            raise FileNotFoundError(
                f"Fashion-MNIST is neither in data_dir={str(self.data_dir)!r} nor in {str(_DEBIAN)!r}, and its "
                "download failed. On Debian and Ubuntu `apt-get install dataset-fashion-mnist` brings it; elsewhere "
                f"put the files {', '.join(_FILES)} into data_dir"
            ) from error

    def load(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return 60,000 images and 10,000 test images, values in [-1, 1): bytes in steps of 1/128, 128 being 0."""
        from torchvision.datasets import FashionMNIST as Reader

        sets = [Reader(str(self.data_dir), train=train) for train in (True, False)]
        train, test = ((s.data.unsqueeze(1).to(torch.float32).sub_(128).div_(128), s.targets) for s in sets)
        return train, test


def _files_in(folder: Path) -> list[Path]:
    """Return the four files, packed or not, or nothing where one is missing."""
    found = [[path for path in (folder / name, folder / f"{name}.gz") if path.is_file()][:1] for name in _FILES]
    return [path for paths in found for path in paths] if all(found) else []


def _unpack(files: list[Path], folder: Path) -> None:
    """Write the files into the folder, unpacked; another process sees each file whole or not at all."""
    from torchvision.datasets.utils import extract_archive

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for file in files:
            target = Path(scratch) / file.name.removesuffix(".gz")
            if file.suffix == ".gz":
                extract_archive(str(file), scratch)
            else:
                target.write_bytes(file.read_bytes())
            os.replace(target, folder / target.name)
