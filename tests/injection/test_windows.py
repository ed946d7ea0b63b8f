"""In every way to train, each forward sees the flips, and each update sees clean weights."""

import pytest
import torch
import torch.nn.functional as F
from latents import (
    Recording,
    Saving,
    Stored,
    batches,
    binary_layers,
    bits,
    by_multiplication,
    copied_state,
    differing,
    draw,
    equal_states,
    multiplied,
    network,
    same_flips,
    sites,
)
from torch import nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from bnnft.injection.latent import LatentFlips


def plain(model, forward, x, y):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    F.cross_entropy(forward(x), y).backward()
    optimizer.step()


def two_optimizers(model, forward, x, y):
    for part in (model[:3], model[3:]):
        optimizer = torch.optim.Adam(part.parameters(), 0.1)
        model.zero_grad()
        F.cross_entropy(forward(x), y).backward()
        optimizer.step()


def by_hand(model, forward, x, y):
    model.zero_grad()
    F.cross_entropy(forward(x), y).backward()
    with torch.no_grad():
        for weight in model.parameters():
            weight -= 0.1 * weight.grad


def by_hand_in_numpy(model, forward, x, y):
    model.zero_grad()
    F.cross_entropy(forward(x), y).backward()
    for weight in model.parameters():
        weight.detach().numpy()[...] -= 0.1 * weight.grad.numpy()


def by_autograd_grad(model, forward, x, y):
    weights = list(model.parameters())
    gradients = torch.autograd.grad(F.cross_entropy(forward(x), y), weights)
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.data = weight.data - 0.1 * gradient


def double_backward(model, forward, x, y):
    x = x.clone().requires_grad_()
    loss = F.cross_entropy(forward(x), y)
    weights = [x, *model.parameters()]
    gradients = torch.autograd.grad(loss, weights, create_graph=True)
    model.zero_grad()
    (loss + sum(gradient.pow(2).sum() for gradient in gradients)).backward()
    torch.optim.SGD(model.parameters(), 0.1).step()


def two_losses(model, forward, x, y):
    model.zero_grad()
    output = forward(x)
    F.cross_entropy(output, y).backward(retain_graph=True)
    output.tanh().mean().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()


def sharpness_aware(model, forward, x, y):
    """A step up, a second gradient there, and back."""
    model.zero_grad()
    F.cross_entropy(forward(x), y).backward()
    with torch.no_grad():
        steps = [0.05 * weight.grad for weight in model.parameters()]
        for weight, step in zip(model.parameters(), steps, strict=True):
            weight += step
    model.zero_grad()
    F.cross_entropy(forward(x), y).backward()
    with torch.no_grad():
        for weight, step in zip(model.parameters(), steps, strict=True):
            weight -= step
    torch.optim.SGD(model.parameters(), 0.1).step()


def lbfgs(model, forward, x, y):
    optimizer = torch.optim.LBFGS(model.parameters(), 0.1, max_iter=4)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(forward(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)


def looks_first(model, forward, x, y):
    """Forwards without gradients beside the one that trains, before and after it."""
    with torch.no_grad():
        forward(x)
        for weight in model.parameters():
            weight *= 0.9
    output = forward(x)
    with torch.no_grad():
        forward(x + 1)
    model.zero_grad()
    F.cross_entropy(output, y).backward()
    torch.optim.SGD(model.parameters(), 0.1).step()


def updated_in_backward(model, forward, x, y):
    def step(weight):
        with torch.no_grad():
            weight -= 0.1 * weight.grad
        weight.grad = None

    hooks = [weight.register_post_accumulate_grad_hook(step) for weight in model.parameters()]
    F.cross_entropy(forward(x), y).backward()
    for hook in hooks:
        hook.remove()


def a_frozen_layer(model, forward, x, y):
    """Frozen and thawed within the batch, as Lightning does it for several optimizers."""
    weight = binary_layers(model)[1].weight
    weight.requires_grad_(False)
    plain(model, forward, x, y)
    weight.requires_grad_(True)
    plain(model, forward, x, y)


def from_an_inner_value(model, forward, x, y):
    """The loss is made of what a layer inside has returned, not of the output."""
    kept = []
    hook = model[5].register_forward_hook(lambda module, args, output: kept.append(output))
    forward(x)
    hook.remove()
    model.zero_grad()
    kept[0].pow(2).mean().backward()
    torch.optim.SGD(model.parameters(), 0.01).step()


def another_call_within_the_backward(model, forward, x, y):
    """Without gradients, before the backward comes to the layers."""
    output = forward(x)

    def call(gradient):
        with torch.no_grad():
            forward(x)

    output.register_hook(call)
    model.zero_grad()
    F.cross_entropy(output, y).backward()
    torch.optim.SGD(model.parameters(), 0.1).step()


class Keeps(nn.Module):
    """Returns nothing: its output is to be fetched."""

    def __init__(self, run):
        super().__init__()
        self.run, self.output = run, None

    def forward(self, x):
        self.output = self.run(x)


def an_error_in_between(model, forward, x, y):
    """A backward that fails is caught, and the batch is tried again."""
    output = forward(x)
    output.register_hook(lambda gradient: gradient.new_zeros(1)[2])
    with pytest.raises(IndexError):
        output.sum().backward()
    with pytest.raises(RuntimeError):
        forward(x[:, :5])
    model.zero_grad()
    plain(model, forward, x, y)


MODES = [plain, two_optimizers, by_hand, by_hand_in_numpy, by_autograd_grad, double_backward, two_losses]
MODES += [sharpness_aware, lbfgs, looks_first, updated_in_backward, a_frozen_layer, from_an_inner_value]
MODES += [an_error_in_between, another_call_within_the_backward]
AGAIN = {two_losses, double_backward}  # go through one forward twice, which autograd refuses where it saved the latent


def trained(mode, kinds, ours, exact=False, check=False):
    """The model after three batches with flips of their own."""
    model = network(*kinds)
    for step, (x, y) in enumerate(batches(3)):
        flips = draw(model, step)
        if ours:
            with LatentFlips(model, sites(model), flips, exact=exact, check=check):
                mode(model, model, x, y)
                assert all(not len(indices) for indices in differing(model, bits(model)).values())
        else:
            mode(model, by_multiplication(model, flips, exact), x, y)
    return model


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("kinds", [(Recording,), (Saving,), (Stored,), (Saving, Recording, Stored)], ids=str)
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.__name__)
def test_a_training_step_is_that_with_signs_multiplied(mode, kinds, exact):
    if mode in AGAIN and kinds != (Recording,):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            trained(mode, kinds, ours=True, exact=exact)
        return
    ours, reference = trained(mode, kinds, True, exact, check=exact), trained(mode, kinds, False, exact)
    assert equal_states(copied_state(ours), copied_state(reference))
    for layer, expected in zip(binary_layers(ours), binary_layers(reference), strict=True):
        if isinstance(layer, Recording):
            assert layer.seen
            assert all(torch.equal(a, b) for a, b in zip(layer.seen, expected.seen, strict=True))


class Checkpointed(nn.Module):
    """Two segments that are computed again in backward, and a layer of the first is used once more in the second.

    Args:
        calls: how a layer is run: as a module, whose hooks run, or by its forward, where none does.
        reentrant: the kind of checkpointing, or None for none.
    """

    def __init__(self, kind, calls, reentrant):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = kind(12, 12), kind(12, 12), kind(12, 3)
        self.calls, self.reentrant = calls, reentrant

    def run(self, layer, x):
        return layer(x) if self.calls == "modules" else layer.forward(x)

    def front(self, x):
        return torch.tanh(self.run(self.second, torch.tanh(self.run(self.first, x))))

    def back(self, x):
        return self.run(self.third, torch.tanh(self.run(self.first, x)))

    def forward(self, x):
        for segment in (self.front, self.back):
            x = segment(x) if self.reentrant is None else checkpoint(segment, x, use_reentrant=self.reentrant)
        return x


def gradients(model):
    return [weight.grad for weight in model.parameters()]


@pytest.mark.parametrize("losses", [1, 2])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("calls", ["modules", "forward"])
@pytest.mark.parametrize("kind", [Recording, Saving, Stored])
def test_gradients_with_checkpointing_are_those_without_it(kind, calls, reentrant, losses):
    x = batches(1)[0][0].requires_grad_()
    plain = Checkpointed(kind, calls, None)
    flips = draw(plain)
    output = functional_call(plain, multiplied(plain, flips), x)
    for power in range(2, 2 + losses):
        output.pow(power).sum().backward(retain_graph=True)
    model, before = Checkpointed(kind, calls, reentrant), bits(plain)
    with LatentFlips(model, sites(model), flips):
        output = model(x)
        assert same_flips(differing(model, before), flips)
        for power in range(2, 2 + losses):
            output.pow(power).sum().backward(retain_graph=True)
            assert not any(map(len, differing(model, before).values()))
    for ours, expected in zip(gradients(model), gradients(plain), strict=True):
        # each reentrant backward adds what it has of a gradient by itself, in another order
        assert torch.allclose(ours, expected, rtol=1e-5, atol=1e-6) if reentrant else torch.equal(ours, expected)
    for layer in binary_layers(model) if kind is Recording else ():
        assert len(layer.seen) >= 2
        assert all(torch.equal(seen, layer.seen[0]) for seen in layer.seen)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", [Recording, Saving, Stored])
def test_a_layer_that_is_checkpointed_by_itself_is_flipped_again_where_it_is_computed_again(kind, reentrant):
    """No module around it says that it awaits a backward."""
    x = batches(1)[0][0].requires_grad_()
    torch.manual_seed(0)
    layers = nn.ModuleList([kind(12, 12), kind(12, 12)])
    flips, before = draw(layers), bits(layers)
    weights = multiplied(layers, flips)
    h = functional_call(layers[0], {"weight": weights["0.weight"]}, x).tanh()
    functional_call(layers[1], {"weight": weights["1.weight"]}, h).pow(2).sum().backward()
    expected, x.grad = [x.grad, *gradients(layers)], None
    layers.zero_grad()
    with LatentFlips(layers, sites(layers), flips):
        h = checkpoint(layers[0], x, use_reentrant=reentrant).tanh()
        checkpoint(layers[1], h, use_reentrant=reentrant).pow(2).sum().backward()
        assert equal_states(bits(layers), before)
    for ours, right in zip([x.grad, *gradients(layers)], expected, strict=True):
        assert torch.equal(ours, right)


class Recurrent(nn.Module):
    """One layer in every step of time, run as a module or by its forward, or its weight alone."""

    def __init__(self, use):
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.use = Recording(12, 12), use

    def forward(self, x):
        for _ in range(4):
            if self.use == "weight":
                x = torch.tanh(F.linear(x, torch.copysign(torch.ones(()), self.cell.weight) + 0 * self.cell.weight))
            else:
                x = torch.tanh(self.cell(x) if self.use == "module" else self.cell.forward(x))
        return x


@pytest.mark.parametrize("use", ["module", "forward", "weight"])
def test_every_use_of_a_weight_in_a_forward_is_flipped(use):
    x = batches(1)[0][0]
    plain, model = Recurrent(use), Recurrent(use)
    flips = draw(model)
    expected = functional_call(plain, multiplied(plain, flips), x)
    expected.pow(2).sum().backward()
    with LatentFlips(model, sites(model), flips):
        output = model(x)
        output.pow(2).sum().backward()
    assert torch.equal(output, expected)
    assert not torch.equal(model(x), expected)
    if use != "weight":
        assert torch.equal(model.cell.weight.grad, plain.cell.weight.grad)
        assert len(model.cell.seen) == 8


def test_a_weight_of_another_part_is_flipped_where_the_site_names_the_module_that_uses_it():
    """The decoder multiplies with the encoder's weight, which is no parameter of its own."""

    class Decoder(nn.Module):
        def __init__(self, encoder):
            super().__init__()
            self.weights = [encoder.weight]

        def forward(self, h):
            return F.linear(h, torch.where(self.weights[0] >= 0, 1.0, -1.0).t())

    encoder = Recording(12, 4)
    model = nn.ModuleDict({"encoder": encoder, "decoder": Decoder(encoder)})
    (site,), h = sites(model), torch.randn(2, 4)
    assert site.name == "encoder.weight"
    named = type("Named", (), {"name": site.name, "weight": site.weight, "zero": None, "layer": "decoder"})()
    clean = model["decoder"](h)
    with LatentFlips(model, [named], {site.name: torch.arange(48)}):
        assert torch.equal(model["decoder"](h), -clean)


def test_within_a_call_that_contains_the_whole_step_updates_see_clean_weights():
    """As under DDP, where Lightning runs the training step inside of the module's forward."""

    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x, y, run=None):
            two_optimizers(self.net, run or self.net, x, y)
            by_hand(self.net, run or self.net, x, y)

    ours, reference = Step(), Step()
    for step, (x, y) in enumerate(batches(3)):
        flips = draw(ours, step)
        with LatentFlips(ours, sites(ours), flips):
            ours(x, y)
        plain = {name.removeprefix("net."): indices for name, indices in flips.items()}
        reference(x, y, by_multiplication(reference.net, plain))
    assert equal_states(copied_state(ours), copied_state(reference))


@pytest.mark.parametrize("kind", [Recording, Saving, Stored])
def test_a_module_that_returns_nothing_may_still_lead_to_a_backward(kind):
    (x, _), plain, model = batches(1)[0], network(kind), Keeps(network(kind))
    flips = draw(plain)
    by_multiplication(plain, flips)(x).sum().backward()
    with LatentFlips(model, sites(model), {f"run.{name}": indices for name, indices in flips.items()}):
        assert model(x) is None
        model.output.sum().backward()
    for ours, expected in zip(gradients(model), gradients(plain), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("gradients_on", [False, True])
def test_a_call_within_the_backward_of_others_is_flipped_until_its_end(gradients_on):
    model, other, (x, _) = network(), nn.Linear(3, 3), batches(1)[0]
    before, flips, seen = bits(model), draw(model), []

    def call(gradient):
        with torch.set_grad_enabled(gradients_on):
            model(x)
        seen.append(differing(model, before))

    with LatentFlips(model, sites(model), flips):
        output = other(torch.randn(2, 3))
        output.register_hook(call)
        output.sum().backward()
        assert same_flips(seen[0], flips)
        assert equal_states(bits(model), before)


def test_a_weight_that_is_thawed_within_the_context_has_the_gradient_through_its_flips():
    (x, _), plain, model = batches(1)[0], network(), network()
    flips, weight = draw(plain), model[3].weight
    by_multiplication(plain, flips, exact=True)(x).sum().backward()
    weight.requires_grad_(False)
    with LatentFlips(model, sites(model), flips, exact=True):
        weight.requires_grad_(True)
        model(x).sum().backward()
    for ours, expected in zip(gradients(model), gradients(plain), strict=True):
        assert torch.equal(ours, expected)
    assert not weight._backward_hooks


def test_whoever_watches_operations_sees_those_of_the_model_alone():
    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func.__name__)
            return func(*args, **(kwargs or {}))

    (x, _), model, flips = batches(1)[0], network(), draw(network())
    operations = []
    for rate in (0, 1):
        seen, before = [], bits(model)
        given = {name: indices[: rate * len(indices)] for name, indices in flips.items()}
        with LatentFlips(model, sites(model), given):
            with Watch():
                loss = model(x).sum()
            assert any(map(len, differing(model, before).values())) == (rate == 1)
            with Watch():
                loss.backward()
        operations.append(seen)
    assert operations[0] == operations[1]


def test_batches_accumulate_each_under_its_own_flips():
    ours, reference = network(), network()
    for model, by_us in ((ours, True), (reference, False)):
        for step, (x, y) in enumerate(batches(3)):
            flips = draw(model, step)
            if by_us:
                with LatentFlips(model, sites(model), flips):
                    F.cross_entropy(model(x), y).backward()
            else:
                F.cross_entropy(by_multiplication(model, flips)(x), y).backward()
        torch.optim.SGD(model.parameters(), 0.1).step()
    assert equal_states(copied_state(ours), copied_state(reference))


def test_a_module_that_returns_what_it_was_given_leaves_no_hook_on_it():
    model = nn.Sequential(network(), nn.Identity())
    parameter = nn.Parameter(torch.ones(2))
    with LatentFlips(model, sites(model), draw(model)):
        model[0].register_forward_hook(lambda *args: (args[-1], parameter))
        model[0](batches(1)[0][0])
    assert not parameter._backward_hooks


@pytest.fixture
def process_group():
    from torch.distributed import HashStore, destroy_process_group, init_process_group

    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    destroy_process_group()


def sharded(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    for layer in binary_layers(model):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@pytest.mark.parametrize("kinds", [(Recording,), (Saving,), (Stored,)], ids=str)
@pytest.mark.parametrize("mode", [plain, two_optimizers, sharpness_aware], ids=lambda mode: mode.__name__)
def test_sharded_weights_are_gathered_flipped(process_group, mode, kinds):
    """In the forward, and again in the backward; no hook on a weight sees its gradient."""
    ours, reference = sharded(network(*kinds)), network(*kinds)
    for step, (x, y) in enumerate(batches(3)):
        flips = draw(reference, step)
        with LatentFlips(ours, sites(ours), flips):
            mode(ours, ours, x, y)
        mode(reference, by_multiplication(reference, flips), x, y)
    expected = copied_state(reference)
    for name, value in ours.state_dict().items():
        assert torch.equal(value.full_tensor() if hasattr(value, "full_tensor") else value, expected[name]), name


@pytest.mark.parametrize("gradients", [False, True])
def test_shards_that_stay_gathered_after_a_forward_are_gathered_anew(process_group, gradients):
    """FSDP2 keeps those of the outermost module until a backward; flipped ones would be used after the context."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    ours, reference, x = network().eval(), network().eval(), batches(1)[0][0]
    fully_shard(ours, mesh=init_device_mesh("cpu", (1,)))
    found, flips = sites(ours), [draw(reference, seed) for seed in (0, 1)]
    with torch.set_grad_enabled(gradients):
        for drawn in flips:
            expected = by_multiplication(reference, drawn)(x)
            with LatentFlips(ours, found, drawn):
                assert torch.equal(ours(x), expected)
            assert torch.equal(ours(x), reference(x))
            assert not torch.equal(reference(x), expected)
        with LatentFlips(ours, found, flips[0]), torch.no_grad():
            assert torch.equal(ours(x), by_multiplication(reference, flips[0])(x))
        assert torch.equal(ours(x), reference(x))


def test_sharded_weights_refuse_what_no_hook_can_do(process_group):
    model = sharded(network())
    with pytest.raises(RuntimeError, match=r"0\.weight: gradient='exact' can't be had under FSDP2"):
        LatentFlips(model, sites(model), draw(network()), exact=True).__enter__()
    model[0].weight.register_post_accumulate_grad_hook(lambda weight: None)
    with pytest.raises(RuntimeError, match=r"0\.weight: its shards are updated within the backward"):
        LatentFlips(model, sites(model), draw(network())).__enter__()
