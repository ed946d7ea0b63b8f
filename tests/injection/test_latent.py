"""When bits are flipped, as users see it, what is refused, and that nothing is left, whatever happens."""

import gc
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from latents import (
    Recording,
    Saving,
    Stored,
    batches,
    bits,
    by_multiplication,
    copied_state,
    differing,
    draw,
    equal_states,
    network,
    same_flips,
    sites,
)
from torch import nn

import bnnft.injection.latent as module_under_test
from bnnft.injection.latent import LatentFlips
from bnnft.nn import BinaryLinear

INJECTION = str(Path(module_under_test.__file__).parent)


def flips_in(model, flips, **options):
    return LatentFlips(model, sites(model), flips, **options)


def left_behind(model):
    """Hooks and attributes that a context may have left on modules and weights."""
    hooks = [
        name
        for module in model.modules()
        for name in ("_forward_hooks", "_forward_pre_hooks", "_state_dict_hooks", "_backward_hooks")
        if getattr(module, name)
    ]
    return (
        hooks
        + [name for weight in model.parameters() for name in vars(weight)]
        + ["hook of the gradient" for weight in model.parameters() if weight._backward_hooks]
    )


@pytest.fixture
def model():
    return network()


@pytest.fixture
def batch():
    return batches(1)[0]


def test_nothing_is_flipped_before_the_forward_and_after_the_backward(model, batch):
    before, flips = bits(model), draw(model)
    with flips_in(model, flips):
        assert equal_states(bits(model), before)
        loss = model(batch[0]).sum()
        assert same_flips(differing(model, before), flips)
        loss.backward()
        assert equal_states(bits(model), before)
        model(batch[0])
        assert same_flips(differing(model, before), flips)
    assert equal_states(bits(model), before)
    assert left_behind(model) == []


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_bits_are_flipped_from_entry_to_exit_for_whatever_reads_them(model, batch, mode):
    before, flips, layer = bits(model), draw(model), model[0]
    expected = by_multiplication(model.eval(), flips)(batch[0]).detach()
    with mode():
        with flips_in(model, flips):
            assert same_flips(differing(model, before), flips)
            assert torch.equal(model.forward(batch[0]), expected)
            assert torch.equal(model(batch[0]), expected)
            signs = torch.where(before["0.weight"], -1.0, 1.0).flatten()
            signs[flips["0.weight"]] *= -1
            assert torch.equal(F.linear(batch[0], layer.weight.sign()), F.linear(batch[0], signs.view_as(layer.weight)))
            assert same_flips(differing(model, before), flips)
        assert equal_states(bits(model), before)
    assert left_behind(model) == []


def test_gradients_within_an_evaluation_see_the_flips_and_close_nothing(model, batch):
    before, flips = bits(model), draw(model)
    expected = torch.autograd.grad(by_multiplication(model, flips, exact=True)(batch[0]).sum(), model[0].weight)[0]
    with torch.no_grad(), flips_in(model, flips, exact=True):
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(model(batch[0]).sum(), model[0].weight)
        assert torch.equal(gradient, expected)
        assert same_flips(differing(model, before), flips)
    assert equal_states(bits(model), before)


def test_a_call_without_gradients_in_training_is_flipped_while_it_runs(model, batch):
    """So that a teacher, say, may be updated by hand after it."""
    before, flips = bits(model), draw(model)
    expected = by_multiplication(model.eval(), flips)(batch[0])
    with flips_in(model, flips):
        with torch.no_grad():
            output = model(batch[0])
        assert equal_states(bits(model), before)
        assert torch.equal(output, expected)
        for weight in model.parameters():
            weight.requires_grad_(False)
        assert torch.equal(model(batch[0]), output)
        assert equal_states(bits(model), before)


@pytest.mark.parametrize("kind", [Recording, Saving, Stored])
def test_a_call_without_gradients_leaves_one_open_that_awaits_its_backward(kind, batch):
    model = network(kind)
    before, flips = bits(model), draw(model)
    with flips_in(model, flips):
        loss = model(batch[0]).sum()
        with torch.no_grad():
            model(batch[0])
        assert same_flips(differing(model, before), flips)
        loss.backward()
        assert equal_states(bits(model), before)


def test_a_call_that_fails_without_gradients_is_restored_at_its_end(model, batch):
    """As where a batch that is too large for the memory is caught, and another one tried."""
    before, flips, seen = bits(model), draw(model), []
    hook = model[6].register_forward_pre_hook(lambda *args: seen.append(differing(model, before)) or 1 / 0)
    with flips_in(model, flips), torch.no_grad():
        with pytest.raises(ZeroDivisionError):
            model(batch[0])
        assert same_flips(seen[0], flips)
        assert equal_states(bits(model), before)
        hook.remove()
        model[0](batch[0])
        assert equal_states(bits(model), before)


def test_each_weight_has_a_window_of_its_own(batch):
    """A generator that was run for a discriminator's update stays flipped until its own backward."""
    models = nn.ModuleList([network(), nn.Sequential(Recording(3, 4), nn.Tanh(), Recording(4, 1))])
    generator, discriminator = models
    before, flips = bits(models), draw(models)

    def now_flipped():
        return {name.partition(".")[0] for name, indices in differing(models, before).items() if len(indices)}

    with flips_in(models, flips):
        fake = generator(batch[0])
        assert now_flipped() == {"0"}
        loss = discriminator(fake.detach()).mean()
        assert now_flipped() == {"0", "1"}
        loss.backward()
        assert now_flipped() == {"0"}
        discriminator(fake).mean().backward()
        assert now_flipped() == set()


def test_restored_bits_are_flipped_again_by_the_next_call(model, batch):
    before, flips = bits(model), draw(model)
    with flips_in(model, flips) as context:
        model(batch[0])
        context.restore()
        assert equal_states(bits(model), before)
        context.restore()
        model(batch[0])
        assert same_flips(differing(model, before), flips)
    assert equal_states(bits(model), before)


@pytest.mark.parametrize("gradients", [True, False])
def test_contexts_add_up_whichever_is_left_first(model, batch, gradients):
    before, first, second = bits(model), draw(model, 1), draw(model, 2)
    both = {name: set(first[name].tolist()) ^ set(second[name].tolist()) for name in first}
    with torch.set_grad_enabled(gradients):
        contexts = [flips_in(model, flips).__enter__() for flips in (first, second)]
        model(batch[0])
        assert {name: set(now.tolist()) for name, now in differing(model, before).items()} == both
        contexts[0].__exit__(None, None, None)
        assert same_flips(differing(model, before), second)
        contexts[1].__exit__(None, None, None)
    assert equal_states(bits(model), before)
    assert left_behind(model) == []


def test_an_evaluation_within_training_leaves_the_window_of_training_open(model, batch):
    before, first, second = bits(model), draw(model, 1), draw(model, 2)
    with flips_in(model, first):
        loss = model(batch[0]).sum()
        with torch.no_grad(), flips_in(model, second):
            model(batch[0])
        assert same_flips(differing(model, before), first)
        loss.backward()
        with torch.no_grad(), flips_in(model, second):
            assert same_flips(differing(model, before), second)
            model(batch[0])
        assert equal_states(bits(model), before)


class Clamping(nn.Linear):
    """Clamps its latent in place in each forward, as brevitas does."""

    def forward(self, x):
        with torch.no_grad():
            self.weight.clamp_(-0.05, 0.05)
        return F.linear(x, torch.where(self.weight >= 0, 1.0, -1.0) + self.weight - self.weight.detach())


@pytest.mark.parametrize("check", [False, True])
def test_a_layer_may_clamp_its_latent_in_its_forward(batch, check):
    torch.manual_seed(0)
    model = nn.Sequential(Clamping(12, 8, bias=False))
    clamped = model[0].weight.detach().clamp(-0.05, 0.05)
    site = sites(network())[0]._replace(name="0.weight", weight=model[0].weight)
    with LatentFlips(model, [site], {"0.weight": torch.arange(0, 96, 2)}, check=check):
        loss = model(batch[0]).sum()
        assert not torch.equal(model[0].weight.sign(), clamped.sign())
        loss.backward()
        assert torch.equal(model[0].weight, clamped)
    assert torch.equal(model[0].weight, clamped)


def test_an_update_without_a_backward_is_refused(model, batch):
    """Momentum moves weights that no loss has reached, here while the forward's flips still wait for it."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for weight in model.parameters():
        weight.grad = torch.randn_like(weight)

    def run():
        with flips_in(model, draw(model)):
            model(batch[0])
            optimizer.step()

    with pytest.raises(RuntimeError, match=r"0\.weight: .*; 3\.weight: .*; 5\.weight: .*Update weights outside of"):
        run()
    assert left_behind(model) == []


@pytest.mark.parametrize("when", ["at the end of the backward", "at the exit", "at the end of the call"])
def test_all_overwritten_layers_are_named_at_once(model, batch, when):
    before = copied_state(model)

    def overwrite(*args):
        with torch.no_grad():
            model[0].weight.neg_()
            model[5].weight.neg_()

    hook = model[6].register_forward_pre_hook(overwrite)
    flips = draw(model)

    def run():
        with flips_in(model, flips), torch.set_grad_enabled(when != "at the end of the call"):
            output = model(batch[0])
            if when == "at the exit":
                raise ValueError("the body's own")
            output.sum().backward()
            pytest.fail("it is silent")

    with pytest.raises(RuntimeError, match=r"\(0\.weight: \d+ flipped bits were o.*; 5\.weight: \d+ flip") as caught:
        run()
    assert isinstance(caught.value.__context__, ValueError) == (when == "at the exit")
    assert torch.equal(model[3].weight, before["3.weight"])
    hook.remove()
    assert left_behind(model) == []


def test_writes_that_torch_does_not_count_are_seen_with_check(model, batch):
    def run():
        with flips_in(model, draw(model), check=True):
            loss = model(batch[0]).sum()
            model[0].weight.data.neg_()
            loss.backward()

    with pytest.raises(RuntimeError, match=r"\(0\.weight: \d+ flipped bits were overwritten\)"):
        run()
    assert left_behind(model) == []


def test_a_weight_that_is_used_without_a_call_is_an_error(model, batch):
    """No module says that it runs: the model would train on clean bits."""
    with (
        pytest.raises(RuntimeError, match=r"5\.weight: it has a gradient, but no module that holds it was called"),
        flips_in(model, draw(model)),
    ):
        F.linear(batch[0], model[5].weight[:, :12]).sum().backward()
    before = bits(model)
    with flips_in(model, draw(model)):
        model.forward(batch[0]).sum().backward()  # its layers are called
        assert equal_states(bits(model), before)


@pytest.mark.parametrize("kind", [Recording, Stored])
def test_a_backward_after_the_context_is_an_error(kind, batch):
    model = network(kind)
    with flips_in(model, draw(model)):
        loss = model(batch[0]).sum()
    with pytest.raises(RuntimeError, match="backward runs after the context of its flips was left"):
        loss.backward()


def test_a_weight_of_another_model_is_an_error(model):
    with pytest.raises(ValueError, match=r"0\.weight is no parameter of Sequential now"):
        LatentFlips(network(), sites(model), draw(model))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("where", ["entered", "forward", "backward"])
def test_an_error_leaves_clean_weights_and_nothing_else(model, batch, error, where):
    before, flips = bits(model), draw(model)

    def fail(*args):
        if where != "entered":
            assert same_flips(differing(model, before), flips)
        raise error

    def run():
        with flips_in(model, flips):
            if where == "entered":
                fail()
            if where == "forward":
                model[6].register_forward_pre_hook(fail)
            output = model(batch[0])
            output.register_hook(fail)
            output.sum().backward()
            pytest.fail("no error")

    with pytest.raises(error):
        run()
    model[6]._forward_pre_hooks.clear()
    assert equal_states(bits(model), before)
    assert left_behind(model) == []


def test_an_entry_that_fails_restores_what_it_has_flipped(model):
    before, flips = bits(model), draw(model)
    flips["5.weight"] = torch.tensor([10**6])
    with torch.no_grad():
        context = flips_in(model, flips)
        with pytest.raises((IndexError, RuntimeError)):
            context.__enter__()
    assert equal_states(bits(model), before)
    assert left_behind(model) == []
    context.close()


def test_bits_come_back_when_a_generator_that_holds_them_is_closed(model):
    def held():
        with torch.no_grad(), flips_in(model, draw(model)):
            yield

    before, holder = bits(model), held()
    next(holder)
    assert not equal_states(bits(model), before)
    holder.close()
    assert equal_states(bits(model), before)


def test_bits_come_back_when_the_context_is_dropped(model):
    """As after an interrupt between the entry and the first line of the block."""
    before = bits(model)
    with torch.no_grad():
        context = flips_in(model, draw(model)).__enter__()
        assert not equal_states(bits(model), before)
        del context
        gc.collect()
    assert equal_states(bits(model), before)
    assert left_behind(model) == []


def training_step(model, batch):
    flips = flips_in(model, draw(model), exact=True)
    with flips:
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        with torch.no_grad():
            model(batch[0])


def evaluation(model, batch):
    with torch.no_grad(), flips_in(model, draw(model)):
        model(batch[0])


def saving(model, batch):
    with flips_in(model, draw(model)):
        model(batch[0])
        model.state_dict()


def stopped_at(line, function, *args):
    """Call the function, with a KeyboardInterrupt at this line of the injection, as they run; say if it came."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        if not frame.f_code.co_filename.startswith(INJECTION):
            return None
        count += event == "line"
        if count == line and event == "line":
            raise KeyboardInterrupt
        return trace

    outer = sys.gettrace()
    sys.settrace(trace)
    try:
        function(*args)
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(outer)
    return False


@pytest.mark.parametrize("part", [training_step, evaluation, saving], ids=lambda part: part.__name__)
def test_an_interrupt_at_any_line_leaves_clean_weights_and_nothing_else(batch, part):
    model, line, stopped = nn.Sequential(BinaryLinear(12, 4, bias=False), BinaryLinear(4, 3, bias=False)), 0, True
    before, seen = bits(model), set()
    model[1].register_forward_hook(lambda *args: seen.add(equal_states(bits(model), before)))
    while stopped:
        line += 1
        stopped = stopped_at(line, part, model, batch)
        assert equal_states(bits(model), before), line
        assert len(left_behind(model)) == 1, line  # the hook above
        assert torch.is_grad_enabled()
        assert torch._C._is_torch_function_enabled()
    assert line > 150
    assert seen == {False}


def test_two_models_train_in_two_threads_as_each_does_alone():
    """With optimizers that step whenever they like; one is in its window while the other updates."""
    together, meet = [network(seed=seed) for seed in (0, 1)], threading.Barrier(2, timeout=60)
    errors = []

    def train(model, wait=lambda: None):
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        for step, (x, y) in enumerate(batches(5)):
            before, flips = bits(model), draw(model, step)
            with flips_in(model, flips):
                loss = F.cross_entropy(model(x), y)
                wait()
                assert same_flips(differing(model, before), flips)
                optimizer.zero_grad()
                loss.backward()
                wait()
                optimizer.step()

    def run(model, number):
        try:
            if number:
                meet.wait()  # half a step behind the other one
            train(model, meet.wait)
            if not number:
                meet.wait()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(model, number)) for number, model in enumerate(together)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for seed, model in enumerate(together):
        alone = network(seed=seed)
        train(alone)
        assert equal_states(copied_state(alone), copied_state(model))
