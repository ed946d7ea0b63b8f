import gzip

import pytest
import torch

from bnnft.dataset import FashionMNIST, fashion_mnist
from bnnft.nn.integers import on_grid


def idx(array):
    """The IDX format, written from its definition: two zeros, type 8 (bytes), rank, sizes, data."""
    header = bytes([0, 0, 8, array.dim()]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + bytes(array.to(torch.uint8).flatten().tolist())


@pytest.fixture
def source(tmp_path, monkeypatch):
    """The four files with 30 and 10 made-up images, packed as Debian packs them; no network."""
    folder = tmp_path / "debian"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for part, size in (("train", 30), ("t10k", 10)):
        images = torch.randint(256, (size, 28, 28), generator=generator)
        images[0, 0, :2] = torch.tensor([0, 255])
        for name, array in (("images-idx3", images), ("labels-idx1", torch.arange(size) % 10)):
            (folder / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(idx(array)))
    monkeypatch.setattr(fashion_mnist, "_DEBIAN", tmp_path / "nowhere")
    return folder


def refuse(*args, **kwargs):
    raise OSError("no network")


def prepared(data_dir):
    data = FashionMNIST(str(data_dir), batch_size=4, validation_size=5)
    data.prepare_data()
    data.setup("fit")
    return data


def test_packed_files_in_the_system_folder_are_unpacked_into_data_dir(source, tmp_path, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "_DEBIAN", source)
    data = prepared(tmp_path / "data")
    images, classes = next(iter(data.test_dataloader()))
    assert images.shape == (4, 1, 28, 28)
    assert classes.tolist() == [0, 1, 2, 3]
    assert (float(images[0, 0, 0, 0]), float(images[0, 0, 0, 1])) == (-1.0, 127 / 128)
    assert on_grid(images) is not None  # so that the first layer computes in integers
    assert sorted(path.name for path in (tmp_path / "data" / "FashionMNIST" / "raw").iterdir()) == sorted(
        path.name.removesuffix(".gz") for path in source.iterdir()
    )


def test_files_in_data_dir_come_first(source, tmp_path):
    assert len(prepared(source)._splits["train"]) == 25


def test_missing_files_without_a_network_name_the_command(source, tmp_path, monkeypatch):
    import torchvision

    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "download", refuse)
    with pytest.raises(FileNotFoundError, match=r"neither in data_dir=.*apt-get install dataset-fashion-mnist"):
        FashionMNIST(str(tmp_path / "empty")).prepare_data()
