"""What bit errors cost: drawing and flipping them, in ratio to one binarization of the same weight.

Run it on an idle machine:

    python tests/benchmarks/bench_flips.py
    python tests/benchmarks/bench_flips.py --json

One unit is ``torch.where(w >= 0, 1.0, -1.0)`` on 8,388,608 float32 weights, one thread. Every number is the best of
9 runs. ``draw`` is ``draw_flips`` and ``flip`` is ``flip_signs`` on the bits just made, which are this step's own, so
that nothing is restored. Their total is held against 0.05 at 1 %, and 0.2 at 10 and 30 %, and the exit status is
1 where a bar is missed. ``cold`` is the two together when the unit ran in between and took the bits out of the caches,
as forward and backward do in training.

The second table is of other error models: draw and flip together in units of those of ``Independent`` at the same (for
two rates, the larger) rate; a die that is drawn already, in units of the flip alone.
"""

import argparse
import json
import sys
import time

import torch
from torch import nn

from bnnft.ber import Asymmetric, Chip, Clustered, Independent, Key, Sequence
from bnnft.injection.injection import draw_flips
from bnnft.injection.signs import flip_signs
from bnnft.injection.sites import find_sites

RATES = (0.001, 0.01, 0.05, 0.1, 0.3)
BARS = {0.01: 0.05, 0.1: 0.2, 0.3: 0.2}
ROUNDS = 9
MODELS = {
    "Asymmetric, 2 : 1": lambda rate: Asymmetric(rate, rate / 2),
    "Asymmetric, 1 -> 0 only": lambda rate: Asymmetric(0, rate),
    "Sequence, chip 7 and 1 %": lambda rate: Sequence([Chip(rate, chip=7), 0.01]),
    "Chip, another in each draw": Chip,
    "Clustered, another in each": Clustered,
}
DRAWN = {"Chip 7": lambda rate: Chip(rate, chip=7), "Chip 7, stuck": lambda rate: Chip(rate, 7, "stuck_at")}
MODEL_BARS = {"Asymmetric, 2 : 1": 2.0, "Asymmetric, 1 -> 0 only": 2.0, "Chip 7": 1.1}
MODEL_RATES = (0.01, 0.1)
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


def binarized(weight):
    return torch.where(weight >= 0, 1.0, -1.0)


def draw(sites, model, bits):
    flips = draw_flips(sites, model, Key(seed=0))["weight"]
    return flips(bits) if callable(flips) else flips  # where the bits decide


def once(sites, model, bits):
    flip_signs(bits, draw(sites, model, bits))


def measure():
    sites, timer = find_sites(Latent(), ["weight"]), Timer()
    weight = sites[0].weight.detach()
    bits = binarized(weight)
    for _ in range(ROUNDS):
        timer("unit", lambda: binarized(weight))
    for rate in RATES:
        model = Independent(rate)
        for _ in range(ROUNDS):
            flips = timer((rate, "draw"), lambda model=model: draw(sites, model, bits))
        for _ in range(ROUNDS):
            timer((rate, "flip"), lambda flips=flips: flip_signs(bits, flips))
        for _ in range(ROUNDS):
            timer("unit", lambda: binarized(weight))
            timer((rate, "cold"), lambda model=model: once(sites, model, bits))
    return timer.best


def measure_models():
    """Ratios by name and rate."""
    sites, ratios = find_sites(Latent(), ["weight"]), {}
    bits = binarized(sites[0].weight.detach())
    for rate in MODEL_RATES:
        timer = Timer()
        for name, build in {"unit": Independent, **MODELS}.items():
            model = build(rate)
            for _ in range(ROUNDS):
                timer(name, lambda model=model: once(sites, model, bits))
        ratios |= {(name, rate): timer.best[name] / timer.best["unit"] for name in MODELS}
        for name, build in DRAWN.items():
            model, timer = build(rate), Timer()
            flips = draw(sites, model, bits)
            for _ in range(ROUNDS):
                timer("alone", lambda flips=flips: flip_signs(bits, flips))
                timer("drawn", lambda model=model: once(sites, model, bits))
            ratios[name, rate] = timer.best["drawn"] / timer.best["alone"]
    return ratios


def model_rows(ratios):
    for name in (*MODELS, *DRAWN):
        shown = {f"{100 * rate:g} %": ratios[name, rate] for rate in MODEL_RATES}
        bar = MODEL_BARS.get(name)
        yield {"model": name, "ratios": shown, "bar": bar, "held": bar is None or max(shown.values()) <= bar}


def model_table(results):
    lines = [f"{'error model':<28}" + "".join(f"{100 * rate:7g} %" for rate in MODEL_RATES) + f" {'bar':>6}"]
    for row in results:
        numbers = "".join(f"{ratio:9.2f}" for ratio in row["ratios"].values())
        bar = "" if row["bar"] is None else f"{row['bar']:6.2f} {'held' if row['held'] else 'MISSED'}"
        lines.append(f"{row['model']:<28}{numbers} {bar}".rstrip())
    return "\n".join(lines)


def rows(best):
    for rate in RATES:
        parts = {part: best[rate, part] / best["unit"] for part in ("draw", "flip", "cold")}
        total = sum(parts[part] for part in ("draw", "flip"))
        bar = BARS.get(rate)
        yield {"rate": rate, **parts, "total": total, "bar": bar, "held": bar is None or total <= bar}


def table(unit, results):
    lines = [
        f"unit: {1000 * unit:.1f} ms",
        f"{'rate':>6} {'draw':>7} {'flip':>7} {'cold':>7} {'total':>7} {'bar':>6}",
    ]
    for row in results:
        numbers = " ".join(f"{row[part]:7.4f}" for part in ("draw", "flip", "cold", "total"))
        bar = "" if row["bar"] is None else f"{row['bar']:6.2f} {'held' if row['held'] else 'MISSED'}"
        lines.append(f"{100 * row['rate']:5.1f}% {numbers} {bar}".rstrip())
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    best = measure()
    results, models = list(rows(best)), list(model_rows(measure_models()))
    if arguments.json:
        numbers = {"unit_ms": 1000 * best["unit"], "torch": torch.__version__, "rates": results, "models": models}
        print(json.dumps(numbers))
    else:
        print(table(best["unit"], results), model_table(models), sep="\n\n")
    sys.exit(not all(row["held"] for row in (*results, *models)))


if __name__ == "__main__":
    main()
