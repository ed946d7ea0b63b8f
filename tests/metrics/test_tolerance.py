import pytest
import torch
import torch.nn.functional as F
from networks import loader, small_data, small_net
from torch import nn

import bnnft
from bnnft.metrics import ImportanceVariance, Margin
from bnnft.nn import BinaryActivation, BinaryLinear


def test_the_table_holds_numbers_by_layer_and_metric():
    net, (x, y) = small_net(), small_data().tensors
    table = bnnft.tolerance(net, loader())
    net.eval()
    with torch.no_grad():
        s = net[0](x)
        expected = (s - net[1].running_mean).abs().mean()
    assert list(table) == ["0", "3", "6"]
    assert table["0"]["margin"] == pytest.approx(float(expected), rel=1e-5)
    assert isinstance(table["0"]["margin"], float)
    assert table["3"]["neuron_importance"].shape == (16,)
    assert table["6"]["class_margin"] > 0
    assert table.left_out == {}
    assert y is not None


def test_the_estimator_is_named_and_a_surrogate_called_one():
    table = bnnft.tolerance(small_net(), loader())
    assert (table["0"]["estimator"], table["3"]["estimator"]) == ("gradient (surrogate)", "gradient")
    table = bnnft.tolerance(small_net(), loader(), metrics=[ImportanceVariance("flip")])
    assert {values["estimator"] for values in table.values()} == {"flip"}


def test_it_prints_one_line_a_layer():
    lines = str(bnnft.tolerance(small_net(), loader())).splitlines()
    assert lines[0].split()[:3] == ["layer", "margin", "margin_normalized"]
    assert [line.split()[0] for line in lines[1:]] == ["0", "3", "6"]
    assert "surrogate" in lines[1]


def test_the_model_is_left_as_it_was():
    net = small_net().train()
    net[1].eval()
    net.insert(3, nn.Dropout(0.5))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    modes, stream = [module.training for module in net.modules()], torch.get_rng_state()
    bnnft.tolerance(net, loader(shuffle=True))
    assert [module.training for module in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_the_loss_may_be_another_one():
    def loss(model, batch):
        return 3 * F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    plain, threefold = bnnft.tolerance(small_net(), loader()), bnnft.tolerance(small_net(), loader(), loss=loss)
    assert threefold["3"]["importance"] == pytest.approx(3 * plain["3"]["importance"], rel=1e-4)
    assert threefold["3"]["importance_cv"] == pytest.approx(plain["3"]["importance_cv"], rel=1e-3)
    assert threefold["3"]["margin"] == plain["3"]["margin"]


def test_what_is_left_out_is_said_and_listed():
    net = nn.Sequential(BinaryLinear(12, 16), nn.ReLU(), BinaryLinear(16, 3))
    with pytest.warns(
        UserWarning, match="tolerance leaves out margins and importance of 0: its outputs are not binary"
    ) as said:
        table = bnnft.tolerance(net, loader())
    assert said[0].filename == __file__
    assert table.left_out == {"margins and importance of 0": "its outputs are not binary"}
    assert list(table) == ["2"]


def test_chains_and_weights_choose():
    net = small_net()
    table = bnnft.tolerance(net, loader(), weights=["0"], chains={"0": ["1", "2"]}, metrics=[Margin()])
    assert list(table) == ["0"]
    with pytest.raises(ValueError, match="'9' names 0 modules"):
        bnnft.tolerance(net, loader(), chains={"9": [None, "2"]})
    with pytest.raises(ValueError, match="'2' is no binarized layer"):
        bnnft.tolerance(net, loader(), chains={"2": [None, "2"]})


def test_no_batch_raises():
    with pytest.raises(ValueError, match="got no batch"):
        bnnft.tolerance(small_net(), [])


def test_a_loss_that_raises_is_the_users_own_error():
    with pytest.raises(ValueError, match="unpack"):
        bnnft.tolerance(small_net(), [torch.randn(4, 12)])


def test_activations_of_tokens_are_measured():
    class Scores(nn.Sequential):
        def forward(self, x):
            return super().forward(x).mean(1)

    net = Scores(BinaryLinear(12, 16), BinaryActivation(), nn.Linear(16, 3))
    x = torch.randn(8, 5, 12, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="margins against zero"):
        table = bnnft.tolerance(net, [(x, torch.arange(8) % 3)])
    with torch.no_grad():
        assert table["0"]["margin"] == pytest.approx(float(net[0](x).abs().mean()), rel=1e-5)
    assert table["0"]["neuron_importance"].shape == (16,)


def test_the_table_shows_the_main_numbers_of_each_layer():
    head = str(bnnft.tolerance(small_net(), loader())).splitlines()[0].split()
    margins = ["margin", "margin_normalized", "margin_below_2", "class_margin"]
    assert head == ["layer", *margins, "importance", "importance_cv", "importance_cv_error", "estimator"]
