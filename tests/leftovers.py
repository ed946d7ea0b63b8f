"""What a batch under flips must not leave behind."""

import torch
from torch._dynamo import eval_frame
from torch.nn.modules import module as modules
from torch.overrides import _get_current_function_mode_stack

_OF_ALL = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_forward_hooks_always_called")


def hooks_in(model):
    """Return how many hooks of forwards there are, on the modules of a model and on all modules."""
    own = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    return own + sum(len(getattr(modules, name)) for name in _OF_ALL)


def assert_nothing_left(model):
    """No hook, mode, stance, replaced method or lent flips."""
    assert hooks_in(model) == 0
    assert not any(parameter._backward_hooks for parameter in model.parameters())
    assert not any({"flips", "log", "log_dict", "state_dict"} & vars(module).keys() for module in model.modules())
    assert _get_current_function_mode_stack() == []
    assert torch._C._is_torch_function_enabled()
    assert eval_frame._stance.stance == "default"
