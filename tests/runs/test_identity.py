from pathlib import Path

import pytest

from bnnft.runs.identity import identity

HERE = Path("/runs/here")


def settings(data_dir="/data/here", target="mine.Data", **others):
    return {"seed": 0, "data_dir": data_dir, "dataset": {"_target_": target, "data_dir": data_dir}} | others


def test_every_setting_that_can_change_a_number_makes_another_run():
    """Also one that is part of another text, and the folder of data that nobody knows."""
    several = [
        settings(),
        settings(seed=1),
        settings(threads=1),
        settings(optimizer={"_target_": "torch.optim.SGD"}),
        settings(optimizer={"_target_": "torch.optim.ASGD"}),
        settings(data_dir="/data/there"),
        settings(data_dir="A", optimizer={"_target_": "torch.optim.SGD"}),
        settings(data_dir="A", optimizer={"_target_": "torch.optim.ASGD"}),
    ]
    assert len({identity(each, HERE) for each in several}) == len(several)


def test_folders_make_no_other_run():
    def moved(folder, **others):
        return identity(settings(root=str(folder), checkpoints=f"{folder}/checkpoints", **others), folder)

    assert moved(HERE) == moved(Path("/elsewhere"))
    assert identity({"root": "/runs/here2"}, HERE) != identity({"root": "2"}, HERE)


def test_data_that_no_data_set_reads_makes_no_other_run():
    given = [{"data_dir": place, "dataset": {"_target_": "bnnft.dataset.Digits"}} for place in ("a", "b")]
    assert identity(given[0], HERE) == identity(given[1], HERE)


@pytest.mark.parametrize("packed", [False, True])
def test_data_counts_by_its_content_where_the_data_set_can_tell_it(tmp_path, packed):
    """Before the usual files are there it counts as these; made-up ones are others, packed or not."""
    import gzip

    def at(folder):
        return identity(settings(str(tmp_path / folder), "bnnft.dataset.FashionMNIST"), HERE)

    names = [f"{part}-{what}-ubyte" for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1")]
    for folder, content in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / folder).mkdir()
        for name in names:
            file = tmp_path / folder / f"{name}{'.gz' * packed}"
            file.write_bytes(gzip.compress(content) if packed else content)
    assert at("empty") == at("nowhere") != at("a")
    assert at("a") == at("b") != at("c")
