"""What bit errors cost: draw, turn and restore, in ratio to one binarization of the same weight.

Run it on an idle machine:

    python tests/benchmarks/bench_flips.py
    python tests/benchmarks/bench_flips.py --json

One unit is ``torch.where(w >= 0, 1.0, -1.0)`` on 8,388,608 float32 weights, one thread. Every number is the best of
9 runs. ``draw``, ``turn`` and ``restore`` are those of ``bnnft.flipped``, with its checks for writes by others, each
repeated in a row; their total is held against 0.06 at 1 %, 0.4 at 10 % and 1.1 at 30 %, and the exit status is 1 where
a bar is missed. ``cold`` is the three together when the unit ran in between and took the weight out of the caches, as
forward and backward do in training.
"""

import argparse
import json
import sys
import time

import torch
from torch import nn

from bnnft.ber import Independent, Key
from bnnft.injection import TurnedBits, draw_flips
from bnnft.sites import find_sites

RATES = (0.001, 0.01, 0.05, 0.1, 0.3)
BARS = {0.01: 0.06, 0.1: 0.4, 0.3: 1.1}
ROUNDS = 9
SHAPE = (2048, 4096)


class Timer:
    """The shortest time of each named part."""

    def __init__(self):
        self.best = {}

    def __call__(self, name, function):
        start = time.perf_counter()
        result = function()
        self.best[name] = min(time.perf_counter() - start, self.best.get(name, float("inf")))
        return result


class Latent(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)))


def once(sites, model):
    TurnedBits(sites, draw_flips(sites, model, Key(seed=0))).restore()


def measure():
    sites, timer = find_sites(Latent(), ["weight"]), Timer()
    weight = sites[0].weight.detach()
    for _ in range(ROUNDS):
        timer("unit", lambda: torch.where(weight >= 0, 1.0, -1.0))
    for rate in RATES:
        model = Independent(rate)
        for _ in range(ROUNDS):
            flips = timer((rate, "draw"), lambda model=model: draw_flips(sites, model, Key(seed=0)))
        for _ in range(ROUNDS):
            turned = timer((rate, "turn"), lambda flips=flips: TurnedBits(sites, flips))
            timer((rate, "restore"), turned.restore)
        for _ in range(ROUNDS):
            timer("unit", lambda: torch.where(weight >= 0, 1.0, -1.0))
            timer(
                (rate, "cold"), lambda model=model: TurnedBits(sites, draw_flips(sites, model, Key(seed=0))).restore()
            )
    return timer.best


def rows(best):
    for rate in RATES:
        parts = {part: best[rate, part] / best["unit"] for part in ("draw", "turn", "restore", "cold")}
        total = sum(parts[part] for part in ("draw", "turn", "restore"))
        bar = BARS.get(rate)
        yield {"rate": rate, **parts, "total": total, "bar": bar, "held": bar is None or total <= bar}


def table(unit, results):
    lines = [
        f"unit: {1000 * unit:.1f} ms",
        f"{'rate':>6} {'draw':>7} {'turn':>7} {'restore':>7} {'cold':>7} {'total':>7} {'bar':>6}",
    ]
    for row in results:
        numbers = " ".join(f"{row[part]:7.4f}" for part in ("draw", "turn", "restore", "cold", "total"))
        bar = "" if row["bar"] is None else f"{row['bar']:6.2f} {'held' if row['held'] else 'MISSED'}"
        lines.append(f"{100 * row['rate']:5.1f}% {numbers} {bar}".rstrip())
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    best = measure()
    results = list(rows(best))
    if arguments.json:
        print(json.dumps({"unit_ms": 1000 * best["unit"], "torch": torch.__version__, "rates": results}))
    else:
        print(table(best["unit"], results))
    sys.exit(not all(row["held"] for row in results))


if __name__ == "__main__":
    main()
