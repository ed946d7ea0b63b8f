"""brevitas 0.13.4: its binary layers are known, so that their first batch is flipped already, and exact."""

import pytest
import torch
from libraries import RATE, check_zeros, exactly_the_drawn_bits, flips_activations, trains_as_by_hand
from networks import Project, equal_states, loader, state, trainer
from torch import nn

import bnnft
from bnnft.callbacks import AccuracyOverBER, BitFlipTraining, ToleranceMetrics

qnn = pytest.importorskip("brevitas.nn", reason="needs brevitas, which is in the extra 'foreign'")
enum = pytest.importorskip("brevitas.inject.enum")
quant = pytest.importorskip("brevitas.quant")

pytestmark = pytest.mark.foreign

BINARY = {"weight_quant_type": enum.QuantType.BINARY}
WEIGHTS = {
    "shipped": {"weight_quant": quant.SignedBinaryWeightPerTensorConst},
    "largest magnitude": BINARY,
    "mean magnitude per channel": BINARY
    | {"weight_scaling_per_output_channel": True, "weight_scaling_stats_op": enum.StatsOp.AVE},
    "learned scale": BINARY | {"weight_scaling_impl_type": enum.ScalingImplType.PARAMETER_FROM_STATS},
    "constant scale": BINARY | {"weight_scaling_impl_type": enum.ScalingImplType.CONST, "weight_scaling_const": 0.5},
}
every_weight = pytest.mark.parametrize("settings", WEIGHTS.values(), ids=WEIGHTS)


def network(settings):
    """A binary convolution, a binary linear layer, binary activations, and an 8 bit layer that is to be left alone."""
    torch.manual_seed(0)
    activation = {"act_quant": quant.SignedBinaryActPerTensorConst}
    return nn.Sequential(
        nn.Unflatten(1, (1, 3, 4)),
        *(qnn.QuantConv2d(1, 8, 2, bias=False, **settings), nn.BatchNorm2d(8), qnn.QuantIdentity(**activation)),
        nn.Flatten(),
        *(qnn.QuantLinear(48, 16, bias=False, **settings), nn.BatchNorm1d(16), qnn.QuantIdentity(**activation)),
        qnn.QuantLinear(16, 3, bias=True),
    )


def binarized(net):
    return [getattr(weight, "value", weight) for weight in (net[1].quant_weight(), net[5].quant_weight())]


@every_weight
def test_binary_layers_are_known_and_others_left_alone(settings):
    assert list(bnnft.binarized_weights(network(settings))) == ["1.weight", "5.weight"]
    ternary = qnn.QuantLinear(8, 4, bias=False, weight_quant_type=enum.QuantType.TERNARY, weight_threshold=0.5)
    assert not bnnft.binarized_weights(ternary)


@every_weight
@pytest.mark.parametrize("how", ["latent", "auto"])
def test_each_batch_computes_with_exactly_the_drawn_bits(tmp_path, settings, how):
    assert exactly_the_drawn_bits(tmp_path, network(settings), binarized, how)


@every_weight
def test_training_is_bit_equal_to_a_plain_loop_that_flips_latents(tmp_path, settings):
    """Also where each forward clamps the latent in place: saved values put back would undo that.

    Where bits are flipped as they are made, the gradient of a scale made of the latents is that of the clean ones.
    """
    assert trains_as_by_hand(tmp_path, [network(settings) for _ in range(2)], "latent")


@pytest.mark.parametrize("scale", ["shipped", "constant scale", "learned scale"])
def test_training_with_flips_where_bits_are_made_is_bit_equal_too(tmp_path, scale):
    assert trains_as_by_hand(tmp_path, [network(WEIGHTS[scale]) for _ in range(2)])


@every_weight
def test_it_is_measured_and_measuring_changes_nothing(tmp_path, settings):
    curve = AccuracyOverBER([0, 0.5], maps=2)
    modules = []
    for callbacks in ([BitFlipTraining(RATE)], [BitFlipTraining(RATE), ToleranceMetrics(), curve]):
        modules.append(Project(network(settings)))
        run = trainer(tmp_path, callbacks)
        run.fit(modules[-1], loader(), loader())
    assert equal_states(state(modules[0]), state(modules[1]))
    logged = {name: float(value) for name, value in run.callback_metrics.items()}
    assert logged["val/margin/1"] > 0
    assert logged["val/margin/5"] > 0
    assert logged["val/importance_cv/5"] > 0
    run.test(modules[1], loader(), verbose=False)
    assert curve.curve.accuracy[1].tolist() != curve.curve.accuracy[0].tolist()


def test_margins_do_not_depend_on_the_scale(tmp_path):
    """In units of what a flip moves, the same bits have the same margins, whatever constant scales them."""
    margins = []
    for scale in (0.25, 0.5):
        module = Project(network(WEIGHTS["constant scale"] | {"weight_scaling_const": scale}))
        run = trainer(tmp_path, [ToleranceMetrics()])
        run.validate(module, loader(), verbose=False)
        margins.append(float(run.callback_metrics["val/margin/1"]))
    assert margins[0] == pytest.approx(margins[1], rel=1e-5)


def test_zeros_of_both_signs_turn_and_come_back():
    """A zero of any sign is +1 in brevitas; with the sign bit turned it would stay so."""
    layer = network(WEIGHTS["constant scale"])[5]
    check_zeros(layer, torch.randn(2, layer.in_features))


def test_binary_activations_are_known_and_flipped(tmp_path):
    assert flips_activations(tmp_path, network(WEIGHTS["shipped"]), ["3", "7"])


def test_an_activation_that_puts_out_a_tensor_of_its_own_kind_is_refused():
    layer = qnn.QuantIdentity(act_quant=quant.SignedBinaryActPerTensorConst, return_quant_tensor=True)
    net = nn.Sequential(layer)
    with bnnft.flipped(net, 0.1, target="activations"), pytest.raises(TypeError, match="return_quant_tensor=False"):
        net(torch.randn(3, 4))
