"""Contexts are told of every call of a module, and leave nothing behind; compiled graphs stay as they are."""

import copy

import pytest
import torch
from latents import batches, bits, by_multiplication, copied_state, differing, draw, network, same_flips, sites
from torch import nn

from bnnft.injection.calls import listen, unlisten
from bnnft.injection.latent import LatentFlips
from bnnft.nn import BinaryLinear


class Notes:
    def __init__(self):
        self.heard = []

    def before_call(self, module):
        self.heard.append(("before", module))

    def after_call(self, module, output):
        self.heard.append(("after", module))


def hooks(module):
    return [*module._forward_pre_hooks, *module._forward_hooks, *module._state_dict_hooks]


def test_each_listener_is_told_once_of_each_call_until_it_stops():
    layer, first, second = nn.Linear(2, 2), Notes(), Notes()
    listen(layer, first)
    listen(layer, second)
    layer(torch.ones(1, 2))
    unlisten(layer, first)
    unlisten(layer, first)
    layer(torch.ones(1, 2))
    unlisten(layer, second)
    layer(torch.ones(1, 2))
    assert first.heard == [("before", layer), ("after", layer)]
    assert second.heard == first.heard * 2
    assert not hooks(layer)


def test_a_call_is_told_before_and_after_what_the_hooks_of_others_do():
    """Those that gather the shards of a weight, say, are to find it flipped."""
    layer, notes = nn.Linear(2, 2), Notes()
    layer.register_forward_pre_hook(lambda *args: notes.heard.append("other before"))
    layer.register_forward_hook(lambda *args: notes.heard.append("other after"))
    listen(layer, notes)
    layer(torch.ones(1, 2))
    unlisten(layer, notes)
    assert notes.heard == [("before", layer), "other before", ("after", layer), "other after"]


def test_a_copy_tells_nobody_and_drops_its_hooks_when_it_runs():
    layer, notes = nn.Linear(2, 2), Notes()
    listen(layer, notes)
    copied = copy.deepcopy(layer)
    copied(torch.ones(1, 2))
    assert notes.heard == []
    assert not hooks(copied)
    assert hooks(layer)
    unlisten(layer, notes)


class Project(nn.Module):
    """Runs its network in a method of its own."""

    def __init__(self):
        super().__init__()
        self.net = network(BinaryLinear)

    def step(self, x):
        return self.net(x)

    def forward(self, x):
        return self.step(x)


def compile_in_place(project, backend):
    project.net.compile(backend=backend)
    return project.step


def compile_in_a_wrapper(project, backend):
    project.net = torch.compile(project.net, backend=backend)
    return project.step


def compile_the_forward(project, backend):
    project.net.forward = torch.compile(project.net.forward, backend=backend)
    return project.step


def compile_a_method(project, backend):
    """As Lightning does with the training step of a compiled module."""
    project.step = torch.compile(project.step, backend=backend)
    return lambda x: project.step(x)


def compile_one_layer(project, backend):
    project.net[0].compile(backend=backend)
    return project.step


def compile_layer_within_the_compiled(project, backend):
    project.net[3].compile(backend=backend)
    project.net.compile(backend=backend)
    return project.step


COMPILED = [compile_in_place, compile_in_a_wrapper, compile_the_forward, compile_a_method, compile_one_layer]
COMPILED += [compile_layer_within_the_compiled]


@pytest.mark.parametrize("first", ["clean", "flipped"])
@pytest.mark.parametrize("compiled", COMPILED, ids=lambda function: function.__name__)
def test_compiled_modules_see_the_flips_and_are_compiled_once(compiled, first):
    """Gradients equal those of the module as written; graphs are those of the first two batches, whatever follows."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        from torch._dynamo.backends.debugging import aot_eager

        graphs.append(graph)
        return aot_eager(graph, inputs)

    plain, project = Project(), Project()
    run = compiled(project, backend)
    methods = [dict(vars(module)) for module in project.modules()]
    if first == "clean":
        run(batches(1)[0][0]).sum().backward()
        plain.step(batches(1)[0][0]).sum().backward()
    counted = [len(graphs)] if first == "clean" and compiled is not compile_one_layer else []
    for number, (x, _) in enumerate(batches(6)):
        flips, before = draw(project, number), bits(project)
        with LatentFlips(project, sites(project), flips):
            for _ in range(2):
                output = run(x)
                assert same_flips(differing(project, before), flips)
                output.sum().backward()
                assert not any(map(len, differing(project, before).values()))
        given = {name.replace("_orig_mod.", ""): indices for name, indices in flips.items()}
        for _ in range(2):
            by_multiplication(plain, given)(x).sum().backward()
        counted.append(len(graphs))
    for ours, expected in zip(project.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours.grad, expected.grad, rtol=1e-4, atol=1e-5)
    assert 0 < counted[0] == counted[-1]
    assert not any(hooks(module) for module in project.modules())
    for module, before in zip(project.modules(), methods, strict=True):
        assert all(vars(module)[name] is value for name, value in before.items() if callable(value))


def test_compiled_evaluation_sees_the_flips():
    torch._dynamo.reset()
    project, plain, x = Project().eval(), Project().eval(), batches(1)[0][0]
    project.net.compile(backend="aot_eager")
    flips = draw(project)
    with torch.no_grad():
        clean = project(x)
        with LatentFlips(project, sites(project), flips):
            assert torch.allclose(project(x), by_multiplication(plain, flips)(x), atol=1e-5)
        assert torch.equal(project(x), clean)
    assert not torch.allclose(by_multiplication(plain, flips)(x), clean, atol=1e-2)


@pytest.mark.filterwarnings("ignore:`torch.jit.* is deprecated")
@pytest.mark.parametrize("script", [torch.jit.script, lambda layer: torch.jit.trace(layer, torch.ones(2, 12))])
def test_a_scripted_layer_sees_the_flips(script):
    layer, plain, x = script(nn.Linear(12, 4, bias=False)), nn.Linear(12, 4, bias=False), batches(1)[0][0]
    plain.load_state_dict(layer.state_dict())
    model = nn.Sequential(layer)
    site = sites(network())[0]._replace(name="0.weight", weight=layer.weight)
    flips = {"0.weight": torch.arange(0, 48, 3)}
    before = copied_state(model)
    with LatentFlips(model, [site], flips):
        output = model(x)
        assert torch.equal(output, by_multiplication(plain, {"weight": flips["0.weight"]})(x))
        assert torch.equal(model.state_dict()["0.weight"], before["0.weight"])
        output.sum().backward()
        assert torch.equal(layer.weight, before["0.weight"])
        assert torch.equal(layer(x), output)
    assert torch.equal(layer.weight, before["0.weight"])
