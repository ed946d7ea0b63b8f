import pytest
import torch
from torch import nn
from torch.testing import assert_close

from bnnft.injection.sites import find_sites
from bnnft.model import FC, VGG3
from bnnft.nn import BinaryActivation, BinaryConv2d, BinaryLinear, binarize
from bnnft.tracing.blocks import Block, find_blocks
from bnnft.tracing.neurons import watch
from bnnft.tracing.trace import Trace

FC_BLOCKS = [Block("fc1", "norm1", "sign1"), Block("fc2", "norm2", "sign2"), Block("fc3", last=True)]
VGG3_BLOCKS = [Block("conv1", "norm1", "sign1"), Block("conv2", "norm2", "sign2"), Block("fc1", "norm3", "sign3")]
VGG3_BLOCKS += [Block("fc2", last=True)]
NAMED = {"fc": FC_BLOCKS, "vgg3": VGG3_BLOCKS}


@pytest.fixture
def fc(randomized):
    return randomized(FC((1, 8, 8), 3, widths=[6, 5]))


@pytest.fixture
def vgg3(randomized):
    return randomized(VGG3((1, 8, 8), 3, channels=4, width=6))


def images(samples=6, side=8, seed=0):
    return torch.randn(samples, 1, side, side, generator=torch.Generator().manual_seed(seed))


def vectors(samples=12, seed=0):
    return torch.randn(samples, 6, generator=torch.Generator().manual_seed(seed))


def found_in(model, inputs):
    """Blocks as they are found, which are followed by operations, where named ones are watched by their modules."""
    with torch.no_grad(), Trace(model) as trace:
        model(inputs)
    return [block for block, _ in find_blocks(trace, [site.layer for site in find_sites(model)]).values()]


both = pytest.mark.parametrize("found", [False, True], ids=["named", "found"])


class Fails(nn.Module):
    def forward(self, x):
        raise ArithmeticError


def hooks_of(model):
    return [len(hooks) for module in model.modules() for name, hooks in vars(module).items() if name.endswith("_hooks")]


@both
@pytest.mark.parametrize("fails", [False, True])
def test_watching_leaves_no_hooks(fails, found, fc):
    fc.fc2.register_forward_hook(lambda *_: None)
    before = hooks_of(fc)
    model = nn.Sequential(fc, Fails() if fails else nn.Identity())
    blocks = found_in(fc, images()) if found else FC_BLOCKS
    try:
        with watch(fc, blocks):
            assert hooks_of(fc) != before
            model(images())
    except ArithmeticError:
        assert fails
    assert hooks_of(fc) == before
    assert not torch.overrides._get_current_function_mode_stack()


def by_hand(model, x):
    """Run a sequential network; return the input of each batch norm, then the scores, and the output of each sign."""
    preactivations, outputs, scores = [], [], None
    for module in model:
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            preactivations.append(x)
        x = module(x)
        if isinstance(module, BinaryActivation):
            outputs.append(x)
        if isinstance(module, BinaryLinear):
            scores = x
    return [*preactivations, scores], [*outputs, None]


@both
@pytest.mark.parametrize("network", ["fc", "vgg3"])
def test_watch_collects_what_is_recomputed_by_hand(network, found, request):
    model = request.getfixturevalue(network)
    blocks = found_in(model, images()) if found else NAMED[network]
    with torch.no_grad(), watch(model, blocks) as seen:
        for seed in (1, 2):
            model(images(seed=seed))
    for call, seed in enumerate((1, 2)):
        preactivations, outputs = by_hand(model, images(seed=seed))
        for block, s, a in zip(blocks, preactivations, outputs, strict=True):
            assert torch.equal(seen[block.layer].preactivations[call], s)
            assert (seen[block.layer].outputs == []) if a is None else torch.equal(seen[block.layer].outputs[call], a)
    assert all(len(observation.preactivations) == 2 for observation in seen.values())


class Inline(nn.Module):
    """Two layers with one batch norm and the sign between them in the forward of the parent."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = BinaryLinear(6, 6), BinaryLinear(6, 6), BinaryLinear(6, 3)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x, only_second=False):
        if not only_second:
            x = binarize(self.norm(self.fc1(x)))
        return self.fc3(binarize(self.norm(self.fc2(x))))


class Disturbing:
    """Operations of other people's hooks in the same forward, with the same names as those of the network."""

    def __init__(self, model):
        self.handles = [m.register_forward_hook(self.look) for m in model.modules()]

    def look(self, module, args, output):
        (output.detach() * 2 + 1).sign().sum()
        torch.copysign(torch.ones(()), args[0])


def test_nothing_that_runs_beside_moves_the_neurons(randomized):
    """Neither hooks nor a forward that leaves layers out: neurons are known by what they are made of."""
    model = randomized(Inline())
    blocks = found_in(model, vectors())
    Disturbing(model)
    with torch.no_grad(), watch(model, blocks) as seen:
        model(vectors())
        model(vectors(seed=1), only_second=True)
        first, second = model.fc1(vectors()), model.fc2(vectors(seed=1))
    assert len(seen["fc1"].preactivations) == len(seen["fc1"].outputs) == 1
    assert torch.equal(seen["fc1"].preactivations[0], first)
    assert torch.equal(seen["fc1"].outputs[0], binarize(model.norm(first)))
    assert len(seen["fc2"].preactivations) == len(seen["fc2"].outputs) == 2
    assert torch.equal(seen["fc2"].preactivations[1], second)
    assert torch.equal(seen["fc2"].outputs[1], binarize(model.norm(second)))


def test_neurons_that_are_made_twice_are_changed_in_all_places(randomized):
    """By a hook that looks at signs first, too."""

    class Twice(Inline):
        def forward(self, x):
            s = self.norm(self.fc1(x))
            return self.fc2(binarize(s)) + self.fc2(binarize(s)).square()

    model = randomized(Twice())
    blocks = found_in(model, vectors())[:1]
    model.norm.register_forward_hook(lambda module, args, output: binarize(output).mean() and None)
    with torch.no_grad(), watch(model, blocks, change={"fc1": lambda a: -a}):
        changed = model(vectors())
    with torch.no_grad():
        a = -binarize(model.norm(model.fc1(vectors())))
        assert torch.equal(changed, model.fc2(a) + model.fc2(a).square())


@both
def test_the_model_goes_on_with_changed_outputs(found, fc):
    blocks = found_in(fc, images()) if found else FC_BLOCKS
    with torch.no_grad(), watch(fc, blocks, change={"fc1": lambda a: -a}) as seen:
        changed = fc(images())
    with torch.no_grad():
        first = -fc.sign1(fc.norm1(fc.fc1(images().flatten(1))))
        assert torch.equal(seen["fc1"].outputs[0], first)
        assert torch.equal(changed, fc.scale(fc.fc3(fc.sign2(fc.norm2(fc.fc2(first))))))


@both
def test_watch_without_batch_norm_collects_the_outputs_of_the_layer(found):
    model = nn.Sequential(BinaryLinear(6, 5), nn.Hardtanh(inplace=True), BinaryActivation(), BinaryLinear(5, 3))
    blocks = found_in(model, vectors()) if found else [Block("0", None, "2")]
    with torch.no_grad(), watch(model, blocks) as seen:
        model(vectors())
    assert torch.equal(seen["0"].preactivations[0], model[0](vectors()))
    assert seen["0"].thresholds == [0.0]


@both
def test_preactivations_are_of_neurons_wherever_their_dimension_is(found):
    """With as many tokens as neurons, too."""
    model = nn.Sequential(BinaryLinear(6, 5), BinaryActivation(), BinaryLinear(5, 3))
    inputs = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0))
    blocks = found_in(model, inputs) if found else [Block("0", None, "1")]
    with torch.no_grad(), watch(model, blocks) as seen:
        model(inputs)
    assert torch.equal(seen["0"].preactivations[0], model[0](inputs).transpose(1, 2))


@both
@pytest.mark.parametrize("graph", [False, True])
def test_watching_changes_nothing(graph, found):
    """Outputs, gradients, batch norm statistics and the global random stream are those of an unwatched step."""

    def step(watched):
        torch.manual_seed(0)
        model = FC((1, 8, 8), 3, widths=[6, 5]).train()
        model.flatten = nn.Sequential(nn.Flatten(), nn.Dropout())
        blocks = found_in(FC((1, 8, 8), 3, widths=[6, 5]).eval(), images()) if found else FC_BLOCKS
        torch.manual_seed(1)
        if watched:
            with watch(model, blocks, graph=graph) as seen:
                outputs = model(images())
            assert seen["fc1"].outputs
        else:
            outputs = model(images())
        outputs.square().mean().backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        return [outputs, *gradients, *model.buffers(), torch.get_rng_state()]

    for watched, alone in zip(step(True), step(False), strict=True):
        assert torch.equal(watched, alone)


@both
def test_a_batch_norm_in_train_mode_gives_no_threshold(found, fc):
    blocks = found_in(fc, images()) if found else FC_BLOCKS
    fc.norm1.train()
    with torch.no_grad(), watch(fc, blocks) as seen:
        fc(images())
    assert seen["fc1"].thresholds == [None]
    assert isinstance(seen["fc2"].thresholds[0], torch.Tensor)


@both
def test_watched_outputs_hold_no_graph_unless_asked(found, fc):
    with watch(fc, found_in(fc, images()) if found else FC_BLOCKS) as seen:
        fc(images())
    assert not any(tensor.requires_grad for o in seen.values() for tensor in o.outputs + o.preactivations)


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sign().mul(1.0)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


SIGNS = {"binarize": binarize, "function": _Sign.apply, "where": lambda x: torch.where(x >= 0, 1.0, -1.0)}
SIGNS |= {"sign": torch.sign, "through": lambda x: x + (x.sign() - x).detach()}


@pytest.mark.parametrize("sign", SIGNS.values(), ids=SIGNS.keys())
@pytest.mark.parametrize("frozen", [False, True])
def test_graph_gives_the_gradients_of_the_outputs(frozen, sign, fc):
    """Also where nothing is learned, and where the sign passes no gradient or is a function of its own."""
    model = fc.requires_grad_(not frozen)
    del model.sign1, model.sign2
    model.sign1 = model.sign2 = sign

    def forward(x):
        first = sign(model.norm1(model.fc1(x.flatten(1))))
        return model.scale(model.fc3(sign(model.norm2(model.fc2(first)))))

    model.forward = forward
    blocks = found_in(model, images())
    with watch(model, blocks, graph=True) as seen:
        loss = model(images()).square().sum()
    (got,) = torch.autograd.grad(loss, seen["fc2"].outputs, retain_graph=True)
    second = seen["fc2"].outputs[0].detach().requires_grad_()
    (expected,) = torch.autograd.grad(model.scale(model.fc3(second)).square().sum(), second)
    assert_close(got, expected)
    assert expected.any()


@pytest.mark.parametrize("frozen", [False, True])
def test_graph_of_named_modules_gives_the_gradients_of_the_outputs(frozen, fc):
    model = fc.requires_grad_(not frozen)
    with watch(model, FC_BLOCKS[:2], graph=True) as seen:
        loss = model(images()).square().sum()
    got = torch.autograd.grad(loss, [seen["fc1"].outputs[0], seen["fc2"].outputs[0]])
    first = model.sign1(model.norm1(model.fc1(images().flatten(1)))).detach().requires_grad_()
    second = model.sign2(model.norm2(model.fc2(first)))
    expected = torch.autograd.grad(model.scale(model.fc3(second)).square().sum(), [first, second])
    assert_close(got, expected)


@both
def test_compiled_network_is_watched_too(found, randomized):
    model = randomized(nn.Sequential(BinaryLinear(6, 5), nn.BatchNorm1d(5), BinaryActivation()))
    blocks = found_in(model, vectors()) if found else [Block("0", "1", "2")]
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(vectors())
        with watch(model, blocks) as seen:
            outputs = compiled(vectors())
    assert torch.equal(seen["0"].outputs[0], outputs)


def test_an_error_of_the_watch_does_not_end_the_forward(fc):
    def fails(output):
        raise ArithmeticError("no change")

    with torch.no_grad():
        expected = fc(images())
        with watch(fc, found_in(fc, images()), change={"fc1": fails}) as seen:
            assert torch.equal(fc(images()), expected)
    with pytest.raises(RuntimeError, match="no change"):
        seen.check()


def test_images_of_another_size_are_watched(randomized):
    model = randomized(nn.Sequential(BinaryConv2d(1, 4, 3), nn.BatchNorm2d(4), BinaryActivation()))
    with torch.no_grad(), watch(model, found_in(model, images())) as seen:
        model(images(side=5))
    assert torch.equal(seen["0"].preactivations[0], model[0](images(side=5)))
