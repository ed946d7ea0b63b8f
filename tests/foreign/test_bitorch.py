"""bitorch 0.4.1: its one bit layers are known, and its own example trains as it is with the callbacks added."""

from argparse import Namespace

import pytest
import torch
from libraries import check_zeros, exactly_the_drawn_bits, flips_activations, trains_as_by_hand
from networks import trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bnnft
from bnnft.ber import Independent
from bnnft.callbacks import AccuracyOverBER, BitFlipTraining, ToleranceMetrics

layers = pytest.importorskip("bitorch.layers", reason="needs bitorch, which is in the extra 'foreign'")

pytestmark = pytest.mark.foreign

QUANTIZATIONS = ["sign", "approxsign", "swishsign", "steheaviside", "weightdorefa"]
every_quantization = pytest.mark.parametrize("name", QUANTIZATIONS)


def network(name):
    torch.manual_seed(0)
    kwargs = {"weight_quantization": name, "bias": False}
    return nn.Sequential(
        nn.Unflatten(1, (1, 3, 4)),
        *(layers.QConv2d(1, 8, 2, input_quantization="sign", **kwargs), nn.BatchNorm2d(8), nn.Flatten()),
        *(layers.QLinear(48, 16, input_quantization="sign", **kwargs), nn.BatchNorm1d(16)),
        nn.Linear(16, 3),
    )


def binarized(net):
    return [net[1]._weight_quantize(net[1].weight), net[4].weight_quantization(net[4].weight)]


@every_quantization
def test_binary_layers_are_known(name):
    assert list(bnnft.binarized_weights(network(name))) == ["1.weight", "4.weight"]


@pytest.mark.parametrize("name", ["progressive_sign", "inputdorefa"])
def test_layers_of_more_than_two_values_are_not(name):
    assert not bnnft.binarized_weights(layers.QLinear(8, 4, bias=False, weight_quantization=name))


@every_quantization
@pytest.mark.parametrize("how", ["latent", "auto"])
def test_each_batch_computes_with_exactly_the_drawn_bits(tmp_path, name, how):
    assert exactly_the_drawn_bits(tmp_path, network(name), binarized, how)


@every_quantization
@pytest.mark.parametrize("how", ["latent", "auto"])
def test_training_is_bit_equal_to_a_plain_loop(tmp_path, name, how):
    assert trains_as_by_hand(tmp_path, [network(name) for _ in range(2)], how)


@pytest.mark.parametrize("name", ["sign", "approxsign", "swishsign", "steheaviside", "weightdorefa"])
def test_zeros_turn_and_come_back(name):
    check_zeros(network(name)[4], torch.randn(2, 48))


@pytest.mark.filterwarnings("ignore:ToleranceMetrics leaves out margins")
def test_resnet_trains_in_its_own_module_and_is_measured(tmp_path):
    """The LightningModule of bitorch's examples, of pytorch_lightning, with nothing changed but the callbacks.

    All of its layers have a residual sum before the sign, so that it has importance and no margins.
    """
    example = pytest.importorskip("examples.image_classification.utils.lightning_model")
    pytorch_lightning = pytest.importorskip("pytorch_lightning")
    models = pytest.importorskip("bitorch.models")
    torch.manual_seed(0)
    arguments = Namespace(lr=0.01, optimizer="sgd", momentum=0.9, lr_scheduler=None)
    module = example.ModelWrapper(models.ResnetE18((1, 3, 32, 32), 10), 10, None, arguments)
    data = DataLoader(TensorDataset(torch.randn(16, 3, 32, 32), torch.arange(16) % 10), batch_size=8)
    training = BitFlipTraining(0.05)
    callbacks = [training, ToleranceMetrics(importance_batches=1)]
    callbacks += [AccuracyOverBER([0], error_model=Independent(0.3))]
    run = trainer(tmp_path, callbacks, pytorch_lightning.Trainer, max_epochs=1)
    run.fit(module, data, data)
    assert len(training.training.injection.sites) == 16
    names = [name.split("/")[1] for name in run.callback_metrics if name.startswith("val/")]
    assert names.count("importance_cv") == 15
    assert names.count("acc_faulty") == 1
    assert names.count("margin") == 0

    def squares(model, batch):
        scores = model(batch[0])
        return scores.double().square().sum(), len(scores)

    curve = bnnft.accuracy_over_ber(module, data, [0, 0.5], maps=2, score=squares, higher_is_better=False)
    assert curve.values[0].tolist() == [curve.clean] * 2
    assert len({*curve.values.flatten().tolist()}) == 3  # two maps, and the clean run


@pytest.mark.parametrize("name", ["sign", "approxsign", "swishsign", "steheaviside"])
def test_binary_activations_are_known_and_flipped(tmp_path, name):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 16), layers.QActivation(name), nn.Linear(16, 3))
    net = nn.Sequential(*net[:2], layers.QLinear(16, 3, input_quantization=name, weight_quantization="sign"))
    assert flips_activations(tmp_path, net, ["1", "2.activation"])
