import pytest
import torch
from torch import nn

from bnnft.tracing.tracking import Looking, Tracking, identity, is_alive


class Noting(Looking):
    """Notes what runs where; stumbles at an operation of a certain name."""

    def __init__(self, model, stumble=None):
        super().__init__(model)
        self.notes, self.stumble = [], stumble

    def before(self, func, args, kwargs):
        if func.__name__ == self.stumble:
            raise ArithmeticError
        self.notes.append((func.__name__, tuple(self.within)))

    def entered(self, name, inputs):
        inputs[0].sign().sum().item()  # what is done to look is no operation of the model


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.ReLU()))


def test_operations_are_seen_with_the_modules_that_run():
    model, x = network(), torch.ones(2, 3)
    with Noting(model) as noting:
        model(x)
    assert noting.notes == [("linear", ("", "0")), ("relu", ("", "1", "1.0"))]
    assert noting.within == []


@pytest.mark.parametrize("stumble", ["linear", "relu"])
def test_an_error_of_one_that_looks_ends_no_forward(stumble):
    model = network()
    expected = model(torch.ones(2, 3))
    with Noting(model, stumble) as noting:
        assert torch.equal(model(torch.ones(2, 3)), expected)
    assert isinstance(noting.error, ArithmeticError)
    assert "relu" not in dict(noting.notes)


def test_an_error_of_the_model_leaves_no_module_running():
    class Fails(nn.Module):
        def forward(self, x):
            raise ArithmeticError

    model = nn.Sequential(Fails())
    with Noting(model) as noting:
        with pytest.raises(ArithmeticError):
            model(torch.ones(2, 3))
        assert noting.within == []
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not torch.overrides._get_current_function_mode_stack()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_scripted_modules_are_let_pass():
    model = nn.Sequential(torch.jit.script(nn.Sequential(nn.Linear(3, 4), nn.ReLU())), nn.Linear(4, 2))
    expected = model(torch.ones(2, 3))
    with Noting(model) as noting:
        assert torch.equal(model(torch.ones(2, 3)), expected)
    assert noting.error is None
    assert ("linear", ("", "1")) in noting.notes


def test_an_error_while_it_starts_leaves_no_hook():
    class Refusing(nn.Linear):
        def register_forward_hook(self, *args, **kwargs):
            raise RuntimeError("no hooks")

    model = nn.Sequential(nn.Linear(3, 4), Refusing(4, 2))
    with pytest.raises(RuntimeError, match="no hooks"), Tracking(model):
        pass
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_identity_is_shared_by_the_same_view_of_the_same_memory_alone():
    x = torch.zeros(2, 3)
    assert identity(x) == identity(x.detach()) == identity(x.view(2, 3))
    assert len({identity(each) for each in (x, x[:1], x[1:], x.view(3, 2), x.clone())}) == 5
    empty = torch.zeros(0, 3), torch.zeros(0, 3)
    assert identity(empty[0]) != identity(empty[1])


def test_a_tensor_whose_memory_was_taken_is_not_alive():
    """As FSDP2 does with whole weights after a forward: to read them would end the process."""
    tensor = torch.zeros(4, 3)
    assert is_alive(tensor)
    assert is_alive(tensor[1:])
    assert is_alive(torch.zeros(0))
    tensor.untyped_storage().resize_(0)
    assert not is_alive(tensor)
