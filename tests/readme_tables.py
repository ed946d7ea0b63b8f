"""Make the README's tables of layers and networks: ``python tests/readme_tables.py`` prints them."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent / "foreign"))

import torch
from structures import STRUCTURES
from uses import Replaced, masks, places_of_uses, run, some_flips

from bnnft.ber import Independent, Key
from bnnft.injection.injection import Injection

LAYERS = {
    "SignFunction": "sign with a straight-through gradient (BinaryNet today)",
    "Flat": "sign times the channel's mean magnitude, flat parameter (Bi-Real-net)",
    "ClampedInPlace": "latent clamped in place in every forward (BinaryConnect)",
    "CopiedGradient": "binarized without a graph, a hook copies the gradient over (BinaryConnect)",
    "Stored": "the parameter holds -1 and +1 itself (Bop)",
    "TorchSign": "`torch.sign` on weight and bias (biases are flipped with `biases=True`)",
    "Transposed": "kernel multiplied from the right, `x @ sign(kernel)`",
    "Centred": "mean of the channel subtracted first (IR-Net, ReCU)",
    "Rotated": "rotated between centring and sign (RBNN)",
    "Scaled": "sign of the weight minus the tensor's mean (BitNet)",
    "TwoValues": "two values a channel, not symmetric (AdaBin)",
    "Stochastic": "bits drawn anew in each forward (stochastic BinaryConnect)",
    "Organized": "latent hidden in an attribute of the parameter (BinaryNet before 2023)",
    "zero_or_one": "bits that are 0 and 1",
    "set_in_a_copy": "bits written into a copy of the weight, first the ones, then the others",
}
NETWORKS = {
    "recurrent": "a recurrence by hand: one weight at every time step",
    "tied": "one weight in several layers",
    "binarized each time": "a layer that runs several times",
    "LSTM": "`nn.LSTM` with parametrized weights (`nn.GRU`, `nn.RNN` too)",
    "attention": "`nn.MultiheadAttention` with parametrized weights",
    "packed": "query, key and value packed in one parameter",
    "experts": "experts in one parameter",
    "bases apart": "several binary bases of one weight, summed",
    "two in one": "two weights joined before they are used",
    "inside of a function": "product inside of an autograd function",
    "weight first": "weight first in the product",
    "permuted": "kernel permuted before it is binarized",
    "teacher": "float teacher and binary student that start with equal signs",
    "tied embedding": "float embedding tied to a binary head",
    "activations like weights": "binary activations of a weight's size",
    "blur": "a constant float kernel beside",
    "scripted beside": "a scripted float block beside",
    "depthwise": "depthwise convolution",
    "transposed convolution": "transposed convolution",
}


def verdict(structure, how):
    """Return what the flips of a network are: exact in every use and nothing else, inexact, or refused."""
    model, inputs = structure.model(), structure.batch(6)
    places = places_of_uses(structure.model(), inputs, structure.batch(6, seed=2))
    flips = some_flips(model, structure.owners())
    reference = structure.model()
    expected = run(reference, inputs, Replaced(masks(structure, reference, places, flips), structure.line))
    injection = Injection(model, how=how)
    with injection.finder:
        run(model, inputs)
    try:
        injection.learn()
    except RuntimeError:
        return "refused"
    if sorted(site.name for site in injection.sites if site.weight.dim() > 1) != structure.owners():
        return "not found"
    with torch.no_grad(), injection.under(flips, Independent(0.3), Key(0)):
        output = run(model, inputs)
    return "yes" if torch.allclose(output, expected, atol=1e-4) else "no"


def table(title, names):
    rows = [f'| {title} | found, exact in every use | with `how="latent"` |', "|---|---|---|"]
    for name, text in names.items():
        structure = STRUCTURES[name]
        rows.append(f"| {text} | {verdict(structure, 'auto')} | {verdict(structure, 'latent')} |")
    return rows


if __name__ == "__main__":
    print("\n".join(table("how the layer makes its bits", LAYERS)), end="\n\n")
    print("\n".join(table("the network", NETWORKS)))
