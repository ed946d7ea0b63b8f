"""Layers that people write by hand: found, flipped exactly or refused, and left as the optimizer wrote them."""

import patterns
import pytest
import torch
import torch.nn.functional as F
from networks import Project, loader, small_net, state, trainer
from operands import Operands, changed
from torch import nn

import bnnft
from bnnft.ber import Independent, Key
from bnnft.callbacks import AccuracyOverBER, BitFlipTraining, ToleranceMetrics
from bnnft.injection.injection import Injection
from bnnft.metrics import ImportanceVariance, Margin
from bnnft.nn import BinaryActivation, binarize

every_layer = pytest.mark.parametrize("layer", [*patterns.EXACT, *patterns.INEXACT], ids=lambda kind: kind.__name__)


def network(layer, width=24, seed=0):
    """Two such layers, and one float layer that is to be left alone."""
    torch.manual_seed(seed)
    return nn.Sequential(
        *(layer(12, width), nn.BatchNorm1d(width), BinaryActivation()),
        *(layer(width, 8), nn.BatchNorm1d(8), BinaryActivation()),
        nn.Linear(8, 3),
    )


def fit(tmp_path, callbacks, module, **kwargs):
    trainer(tmp_path, callbacks, **kwargs).fit(module, loader())
    return module


@every_layer
def test_binarized_weights_are_found_and_nothing_else(layer):
    found = list(bnnft.find_binarized_weights(network(layer), torch.randn(6, 12)))
    assert [name.split(".")[0] for name in found] == ["0", "3"]
    assert not any("bias" in name for name in found)


def test_binary_biases_are_reported_if_asked():
    model = network(patterns.TorchSign)
    found = bnnft.find_binarized_weights(model, torch.randn(6, 12), biases=True)
    assert list(found) == ["0.weight", "0.bias", "3.weight", "3.bias"]


def test_the_log_says_once_what_is_flipped_and_how_it_was_found(tmp_path, caplog):
    with caplog.at_level("INFO"):
        fit(tmp_path, [BitFlipTraining(0.1)], Project(network(patterns.TorchSign)))
    said = [record.getMessage() for record in caplog.records if "BitFlipTraining" in record.getMessage()]
    assert said == [
        "BitFlipTraining: Independent(rate=0.1) on 480 bits in net.0.weight (found, made), net.3.weight (found, made)",
        "BitFlipTraining leaves binary biases alone: net.0.bias, net.3.bias; biases=True flips them",
    ]


@pytest.mark.parametrize("how", ["latent", "operand"])
def test_biases_are_flipped_if_asked(tmp_path, how):
    callback = BitFlipTraining(0.1, biases=True, how=how)
    fit(tmp_path, [callback], Project(network(patterns.TorchSign)))
    assert [site.name for site in callback.training.injection.sites if site.weight.dim() == 1] == [
        "net.0.bias",
        "net.3.bias",
    ]


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(16, 8),
        nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(32, 3)),
        nn.TransformerEncoderLayer(16, 2, 16, batch_first=True),
    ],
    ids=["linear", "convolution", "transformer"],
)
def test_float_layers_are_never_found(model):
    inputs = torch.randn(2, 1, 4, 4) if isinstance(model, nn.Sequential) else torch.randn(2, 4, 16)
    assert bnnft.find_binarized_weights(model, inputs) == {}


def test_finding_changes_nothing():
    model = network(patterns.Stochastic)
    before, stream = state(model), torch.get_rng_state()
    bnnft.find_binarized_weights(model, torch.randn(6, 12, generator=torch.Generator().manual_seed(0)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), stream)


def drawn(module, step, rate=0.2):
    """Flat indices of the bits that are wrong in a step, by the positions of the two weights."""
    names = [name for name, _ in module.named_parameters()]
    for layer in ("0", "3"):
        name = next(name for name in names if name.startswith(f"net.{layer}.") and "bias" not in name)
        weight = dict(module.named_parameters())[name]
        yield Independent(rate).flips(weight, Key(0, step, purpose="training").at(names.index(name)))


LAYERS = [*patterns.EXACT, *patterns.INEXACT, patterns.Organized]
CASES = [(layer, how) for layer in LAYERS if layer is not patterns.Stochastic for how in ("auto", "operand")]
CASES += [(layer, "latent") for layer in patterns.EXACT]


@pytest.mark.parametrize(("layer", "how"), CASES, ids=lambda case: getattr(case, "__name__", case))
def test_each_batch_computes_with_exactly_the_drawn_bits(tmp_path, layer, how):
    """Against the first batch, in which nobody knew the layers yet, at a learning rate of 0; float layers are clean."""
    module, batches = Project(network(layer), lr=0.0), loader()
    with Operands() as operands:
        trainer(tmp_path, [BitFlipTraining(0.2, how=how)], max_epochs=1).fit(module, batches)
    operands.seen = [operand for operand in operands.seen if operand.shape[0] != operand.shape[1]]  # no rotations
    first, *rest = operands.steps(3)
    assert len(rest) == 5
    waiting = layer is patterns.Stored  # for an update that leaves it with its two values
    for step, seen in enumerate(rest[waiting:], 1 + waiting):
        assert torch.equal(first[2], seen[2])
        for clean, wrong, indices in zip(first[:2], seen[:2], drawn(module, step), strict=True):
            assert torch.equal(changed(clean, wrong), indices)
            same = (0, 1) if layer is patterns.Transposed else (1,)  # over which the two values are the same
            others = clean.amin(same, keepdim=True) + clean.amax(same, keepdim=True) - clean
            assert torch.allclose(wrong.reshape(-1)[indices], others.reshape(-1)[indices], atol=1e-6)


@pytest.mark.parametrize("layer", [*patterns.INEXACT, patterns.Organized], ids=lambda kind: kind.__name__)
def test_a_latent_that_is_not_the_bit_is_refused(tmp_path, layer):
    with pytest.raises(RuntimeError, match=r"net\.\d\.weight: .*how='operand'"):
        fit(tmp_path, [BitFlipTraining(0.2, how="latent")], Project(network(layer)))


@every_layer
def test_every_layer_trains_without_an_argument(tmp_path, layer):
    """What holds the bits itself must stay so: under Adam it is a float layer after one update."""
    callback, module = BitFlipTraining(0.2), Project(network(layer), lr=0.0 if layer is patterns.Stored else 0.01)
    fit(tmp_path, [callback], module)
    sites = callback.training.injection.sites
    assert [site.name.split(".")[1] for site in sites] == ["0", "3"]
    assert {site.where for site in sites} == {"stored" if layer is patterns.Stored else "made"}
    assert all(torch.isfinite(weight).all() for weight in module.parameters())


def test_a_hidden_latent_is_never_written_to(tmp_path):
    """A latent that is an attribute of the parameter survives, since nothing is written to either."""
    module = Project(network(patterns.Organized))
    plain = {name: weight.detach().clone() for name, weight in module.named_parameters()}
    fit(tmp_path, [BitFlipTraining(0.2)], module, max_steps=3)
    assert torch.equal(module.net[0].weight.org, plain["net.0.weight"])


@pytest.mark.parametrize("gradient", ["straight_through", "exact"])
def test_operand_and_latent_flips_train_alike(tmp_path, gradient):
    """Where both are exact they give the same weights, bit for bit."""
    states = [
        state(
            fit(tmp_path, [BitFlipTraining(0.2, how=how, gradient=gradient)], Project(network(patterns.SignFunction)))
        )
        for how in ("latent", "operand")
    ]
    assert all(torch.allclose(states[0][name], states[1][name], atol=1e-6) for name in states[0])


@every_layer
def test_measuring_needs_no_word_about_the_layers(tmp_path, layer):
    """Curve and margins of a foreign network, and its weights as before."""
    # weights that are stored as -1 and +1 must stay so
    module = Project(network(layer), lr=0.0 if layer is patterns.Stored else 0.01)
    fit(tmp_path, [], module)
    trainer(tmp_path, []).test(module, loader(), verbose=False)
    before = state(module)
    curve, metrics = AccuracyOverBER([0, 0.5], maps=2), ToleranceMetrics()
    run = trainer(tmp_path, [curve, metrics])
    run.test(module, loader(), verbose=False)
    logged = {name: float(value) for name, value in run.callback_metrics.items()}
    assert curve.curve.accuracy[1].tolist() != curve.curve.accuracy[0].tolist()
    assert logged["test/margin/0"] > 0
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_margins_are_in_units_of_the_scale(tmp_path):
    """A layer times c has the margins of the same layer without: one flip moves it by 2c, and by 2."""

    class Double(patterns.SignFunction):
        def forward(self, x):
            return 2 * super().forward(x)

    class DoubleWeights(patterns._Layer):
        def forward(self, x):
            return nn.functional.linear(x, 2 * patterns._Sign.apply(self.weight))

    margins = []
    for layer in (patterns.SignFunction, DoubleWeights):
        module = Project(network(layer))
        run = trainer(tmp_path, [ToleranceMetrics()])
        run.validate(module, loader(), verbose=False)
        margins.append(float(run.callback_metrics["val/margin/0"]))
    assert margins[0] == pytest.approx(margins[1], rel=1e-5)


class BinarizesInput(patterns.SignFunction):
    """Makes the binary neurons of the layer before it itself, as BinaryNet, IR-Net and others do."""

    def __init__(self, inputs, outputs, sign):
        super().__init__(inputs, outputs)
        self.sign = sign

    def forward(self, x):
        return super().forward(self.sign(x))


def losses(module, batch):
    return F.cross_entropy(module(batch[0]), batch[1], reduction="none")


def clipped(x):
    clip = x.clamp(-1, 1)
    return clip + (x.sign() - clip).detach()


# each with the module whose gradient it has
SIGNS = {
    "function": (lambda x: binarize(x, 1.0), BinaryActivation(1.0)),
    "autograd function": (patterns._Sign.apply, BinaryActivation(None)),
    "clip and detach": (clipped, BinaryActivation(1.0)),
    "detach": (lambda x: x + (torch.where(x >= 0, 1.0, -1.0) - x).detach(), BinaryActivation(None)),
}


@pytest.mark.parametrize("estimator", ["gradient", "flip"])
@pytest.mark.parametrize(("function", "activation"), SIGNS.values(), ids=SIGNS)
def test_neurons_that_are_made_inside_of_the_next_layer_are_measured(tmp_path, function, activation, estimator):
    """With the values of the same network whose neurons are outputs of modules."""
    torch.manual_seed(0)
    layers = patterns.SignFunction(12, 24), BinarizesInput(24, 8, function), BinarizesInput(8, 3, function)
    norms = nn.BatchNorm1d(24), nn.BatchNorm1d(8)
    for norm in norms:
        nn.init.normal_(norm.running_mean)
    inside = nn.Sequential(layers[0], norms[0], layers[1], norms[1], layers[2])
    plain = [patterns.SignFunction(*layer.weight.shape[::-1]) for layer in layers]
    for layer, other in zip(plain, layers, strict=True):
        layer.weight = other.weight
    outside = nn.Sequential(plain[0], norms[0], activation, plain[1], norms[1], activation, plain[2])
    values = []
    for net in (outside, inside):
        run = trainer(tmp_path, [ToleranceMetrics([Margin(), ImportanceVariance(estimator)], loss=losses)])
        run.validate(Project(net), loader(), verbose=False)
        values.append({name: float(v) for name, v in run.callback_metrics.items() if name.startswith("val/")})
    for layer, other in (("0", "0"), ("3", "2")):
        for name in ("margin", "margin_q50", "importance", "importance_cv"):
            assert values[0][f"val/{name}/{layer}"] > 0
            assert values[1][f"val/{name}/{other}"] == pytest.approx(values[0][f"val/{name}/{layer}"], rel=1e-3)


class WithZeros(patterns.SignFunction):
    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.weight.data[:, ::3] = 0.0
        self.weight.data[:, ::6] = -0.0


@pytest.mark.parametrize("how", ["auto", "latent"])
def test_exact_zeros_flip_and_come_back(how):
    """A comparison makes +1 of both zeros."""
    layer, x = WithZeros(12, 24), torch.randn(6, 12)
    clean, before = layer(x), layer.weight.detach().clone()
    injection = Injection(layer, how=how)
    with injection.finder:
        layer(x)
    injection.learn()
    with torch.no_grad(), injection.under({"weight": torch.arange(before.numel())}, Independent(1.0), Key()):
        assert torch.equal(layer(x), -clean)
    assert torch.equal(layer.weight.view(torch.int32), before.view(torch.int32))


def test_own_and_foreign_layers_in_one_network(tmp_path):
    """The known ones are flipped from the first batch on."""
    net = nn.Sequential(small_net()[:3], patterns.SignFunction(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 3))
    callback = BitFlipTraining(0.2)
    fit(tmp_path, [callback], Project(net))
    assert [site.name for site in callback.training.injection.sites] == ["net.0.0.weight", "net.1.weight"]


def test_after_the_run_nothing_is_left(tmp_path):
    module = Project(network(patterns.SignFunction))
    fit(tmp_path, [BitFlipTraining(0.2)], module)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    assert not torch.overrides._get_current_function_mode_stack()
