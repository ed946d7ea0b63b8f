"""What a network computes with: the weights that reach its linear maps."""

from torch.overrides import TorchFunctionMode

_MAPS = ("linear", "matmul", "__matmul__", "__rmatmul__")


class Operands(TorchFunctionMode):
    """Keeps the weight operand of every linear map; entered before anything else, it sees what is computed at last."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in _MAPS and len(args) > 1:
            operand = getattr(args[1], "value", args[1])  # which brevitas wraps
            self.seen.append(operand.detach().clone())
        return func(*args, **(kwargs or {}))

    def steps(self, layers):
        """Return the operands of each forward of a network of so many linear maps."""
        assert self.seen, "nothing was seen"
        assert len(self.seen) % layers == 0
        return [self.seen[start : start + layers] for start in range(0, len(self.seen), layers)]


def changed(clean, wrong):
    """Return the flat indices at which two operands differ."""
    return (clean != wrong).reshape(-1).nonzero().squeeze(1)
