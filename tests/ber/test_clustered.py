"""Where faults gather; their rate is held in test_error_models.py."""

import itertools

import numpy as np
import pytest
import torch

from bnnft.ber import Clustered, Key

ROWS, COLUMNS, LINES = 1024, 16, 32


def faults(model, blocks, key=None, rows=ROWS, columns=COLUMNS):
    """Faults by block, word and column."""
    counts = torch.zeros(blocks * rows * columns, dtype=torch.int64)
    counts[model.flips(torch.ones(blocks, rows, columns), key or Key(1))] = 1
    return counts.view(blocks, rows, columns)


def dispersion(counts):
    """k of the negative binomial distribution with the mean and variance of some counts."""
    counts = counts.double().numpy()
    return counts.mean() ** 2 / (counts.var(ddof=1) - counts.mean())


@pytest.mark.parametrize("lines", ["bitline", "wordline"])
def test_faults_of_blocks_disperse_as_stated(lines):
    """At small rates 1/k = 1/block + 1/(line * lines); within a quarter, over 6,000 blocks and a fixed seed."""
    model = Clustered(0.002, lines=lines, block_dispersion=1.0, line_dispersion=0.1)
    shares = LINES if lines == "bitline" else ROWS // 2
    k = dispersion(torch.cat([faults(model, 2000, Key(draw)).sum((1, 2)) for draw in range(3)]))
    assert k == pytest.approx(1 / (1 + 1 / (0.1 * shares)), rel=0.25)


@pytest.mark.parametrize(
    ("lines", "weak"),
    [
        # lines by block: (column, parity of the word), or pairs of words
        ("bitline", lambda cells: cells.view(len(cells), ROWS // 2, 2, COLUMNS).sum(1).flatten(1)),
        ("wordline", lambda cells: cells.view(len(cells), ROWS // 2, 2, COLUMNS).sum((2, 3))),
    ],
)
def test_faults_gather_in_few_lines_and_nowhere_else(lines, weak):
    """A tenth of the lines holds most faults, a tenth of lines laid otherwise does not."""
    cells = faults(Clustered(0.02, lines=lines, block_dispersion=50, line_dispersion=0.02), 200)
    along = weak(cells).flatten().sort(descending=True).values.double()
    across = (cells.sum(2) if lines == "bitline" else cells.sum(1)).flatten().sort(descending=True).values.double()
    share = [float(counts[: len(counts) // 10].sum() / counts.sum()) for counts in (along, across)]
    assert share[0] > 0.9
    assert share[0] > share[1] + 0.2


def test_defaults_gather_faults_as_on_the_board_that_they_are_fitted_to():
    """KC705 at 0.53 V, 890 blocks of one byte a word, 1137 faults; means over 25 boards.

    Measured there: k 0.079, 86 % of faults share a column with another, 72 % are in columns with four or more, 97 % of
    columns with two or more fail in one parity.
    """
    boards = []
    for draw in range(25):
        cells = faults(Clustered(1137 / (890 * 8192), columns=8), 890, Key(2, draw), columns=8)
        columns, parities = cells.sum(1), cells.view(890, ROWS // 2, 2, 8).sum(1)
        several = columns >= 2
        one_parity = float(((parities > 0).sum(1)[several] == 1).double().mean())
        in_columns = [float(columns[columns >= least].sum() / columns.sum()) for least in (2, 4)]
        boards.append([dispersion(cells.sum((1, 2))), *in_columns, one_parity])
    k, share_2, share_4, one_parity = np.mean(boards, axis=0)
    assert k == pytest.approx(0.079, rel=0.25)
    assert share_2 == pytest.approx(0.86, abs=0.07)
    assert share_4 == pytest.approx(0.72, abs=0.07)
    assert one_parity > 0.85


def test_one_chip_only_adds_faults_at_higher_rates():
    maps = [faults(Clustered(rate, chip=3), 20) for rate in (0, 1e-4, 0.01, 0.3, 0.5, 0.99, 1.0)]
    for low, high in itertools.pairwise(maps):
        assert bool((low <= high).all())
    assert maps[0].sum() == 0
    assert bool(maps[-1].all())


def test_a_weight_that_does_not_fill_its_last_block_has_the_faults_of_the_part_that_it_fills():
    whole = Clustered(0.3, chip=1).flips(torch.ones(2 * ROWS * COLUMNS), Key())
    part = Clustered(0.3, chip=1).flips(torch.ones(ROWS * COLUMNS + 777), Key())
    assert torch.equal(part, whole[whole < ROWS * COLUMNS + 777])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"rate": -0.1}, r"rate must be a fraction in \[0, 1\], got -0.1"),
        ({"lines": "column"}, "lines must be one of bitline, wordline, got 'column'"),
        ({"rows": 0}, "rows must be an integer >= 1, got 0"),
        ({"columns": 1.5}, "columns must be an integer >= 1, got 1.5"),
        ({"rows": 10, "multiplexing": 4}, "multiplexing must divide rows.*got multiplexing=4 for rows=10"),
        ({"block_dispersion": 0}, "block_dispersion must be a number >= 0.05, got 0"),
        ({"line_dispersion": float("nan")}, "line_dispersion must be a number >= 1e-06, got nan"),
        ({"stuck_at_1": 0.5}, "stuck_at_1 is for kind='stuck_at'"),
    ],
)
def test_bad_arguments_are_named(arguments, says):
    with pytest.raises(ValueError, match=says):
        Clustered(**{"rate": 0.1, **arguments})
