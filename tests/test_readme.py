"""The README's tables are those that the code makes."""

from pathlib import Path

import pytest
from readme_tables import LAYERS, NETWORKS, table

README = (Path(__file__).parents[1] / "README.md").read_text()


@pytest.mark.parametrize(
    ("title", "names"),
    [("how the layer makes its bits", LAYERS), ("the network", NETWORKS)],
    ids=["layers", "networks"],
)
def test_tables_of_what_is_found_and_flipped_are_as_measured(title, names):
    rows = table(title, names)
    assert len(rows) == 2 + len(names)
    assert "\n".join(rows) in README
    assert all("| yes |" in row for row in rows[2:])
