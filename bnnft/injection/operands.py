"""Find binarized weights by what a model computes with: the binary operands of its linear maps and convolutions.

No class names are needed: one forward is watched, every operand that could be a weight is looked at, and where it
holds one magnitude (or two values) it is matched with the parameter that it was made of.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from bnnft.tracing.sharding import is_sharded, whole
from bnnft.tracing.tracking import LINEAR_MAPS, Tracking, tensors

_TOLERANCE = 1e-3  # of magnitudes that count as equal: scales are products of rounded numbers
_MOST_ZEROS = 0.01  # share of exact zeros, which torch.sign leaves
_FEWEST = 8  # values in a row or column: fewer look binary by chance

How = Literal["stored", "sign", "graph"]


class Operand(NamedTuple):
    """A binary operand, and the parameter that it was made of.

    Attributes:
        parameter: qualified name.
        module: innermost module whose operation took the operand.
        number: of the operand among all that could be weights, within one run of this module.
        how: the parameter was found because it *is* the operand (``"stored"``), because the operand has its
            ``"sign"``, or because it alone lies behind the operand in the autograd ``"graph"`` (where there is none:
            in the same module). Only with the first two can the sign of the parameter be the bit.
        symmetric: the two values are -c and c.
        transposed: the operand is the transpose of the parameter.
        fan_in: number of weights of one output neuron.
        zero: the sign that the layer makes of a latent of exactly 0, +1 if there was none.
        signs: int8, shape of the flattened parameter: on which side of its middle each value lies, 0 for neither.
        scale: half the distance of the two values for each output neuron, ``None`` if it is 1 for all: a flip moves
            a neuron by twice that.
    """

    parameter: str
    module: str
    number: int
    how: How
    symmetric: bool
    transposed: bool
    fan_in: int
    zero: int
    signs: Tensor = torch.empty(0, dtype=torch.int8)
    scale: Tensor | None = None

    def state(self) -> dict[str, Any]:
        """Return what does not change with the weights, by field, in plain types."""
        return {field: value for field, value in self._asdict().items() if field not in ("signs", "scale")}


def could_be_weights(func: Any, args: Any, kwargs: Any, sizes: set[int]) -> tuple[Tensor, ...]:
    """Return the float tensors among the arguments of a linear map or convolution that have the size of a parameter.

    The first argument of a linear map or convolution is what the layer is given; a product may have its weight first.
    """
    operation = getattr(func, "__name__", "").strip("_")
    if not operation.startswith(LINEAR_MAPS):
        return ()
    given = tensors(args[:1]) if operation.startswith(("linear", "conv", "bilinear", "embedding")) else ()
    return tuple(
        tensor
        for tensor in tensors((args, kwargs))
        if tensor.is_floating_point() and tensor.numel() in sizes and all(tensor is not other for other in given)
    )


def middles(operand: Tensor, symmetric: bool) -> Tensor:
    """Return the middle of the two values, 0 if they are symmetric: of the tensor, or of each row if rows differ."""
    if symmetric:
        return torch.zeros((), dtype=operand.dtype, device=operand.device)
    if _binary(operand.reshape(1, -1), symmetric=False):
        return (operand.amin() + operand.amax()) / 2
    rows = operand.flatten(1)
    return ((rows.amin(1) + rows.amax(1)) / 2).view(-1, *[1] * (operand.dim() - 1))


class OperandTracking(Tracking):
    """Base of modes that know each operand by its place: who watches and who turns must count alike.

    Args:
        model: the module that is to run.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.parameters = {name: weight for name, weight in model.named_parameters() if weight.is_floating_point()}
        self._sizes = {weight.numel() for weight in self.parameters.values()}
        self._numbers: list[int] = [0]

    def entered(self, name: str, inputs: tuple[Tensor, ...]) -> None:
        """Count operands anew in each module."""
        self._numbers.append(0)

    def left(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> None:
        """Go back to the outer module's count."""
        self._numbers.pop()

    def placed(self, func: Any, args: Any, kwargs: Any) -> Iterator[tuple[tuple[str, int], Tensor]]:
        """Yield what could be weights with its place: the innermost module, and the number within its run."""
        for operand in could_be_weights(func, args, kwargs, self._sizes):
            place = self.within[-1] if self.within else "", self._numbers[-1]
            self._numbers[-1] += 1
            yield place, operand


class OperandWatch(OperandTracking):
    """Looks at every operand that could be a weight while active; changes nothing of the run.

    An operand is known by the values that parameters have when it is used.

    Args:
        model: the module that is to run.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._seen: set[tuple[str, int]] = set()
        self._found: dict[str, Operand] = {}

    def operation(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Look at what could be weights, as it is before the operation."""
        given = tensors((args, kwargs))[:1]
        for place, operand in self.placed(func, args, kwargs):
            if place not in self._seen:
                self._seen.add(place)
                self._look(place, func.__name__, operand, first=operand is given[0])
        return func(*args, **kwargs)

    def operands(self) -> dict[str, Operand]:
        """Return the binary operands by the name of their parameter, the first of each."""
        return self._found

    def _look(self, place: tuple[str, int], operation: str, operand: Tensor, first: bool) -> None:
        """Add an operand to those found, if it is binary and its parameter is new."""
        values = operand.detach()
        symmetric = _symmetric(values)
        if symmetric is None:
            return
        signs = (values if symmetric else values - middles(values, symmetric)).sign().to(torch.int8)
        owner = _owner(operand, signs, self.parameters, place[0])
        # the first operand of a product is more likely activations
        if owner is None or owner[0] in self._found or (first and owner[1] == "graph"):
            return
        name, how, transposed = owner
        flat = (signs.t() if transposed else signs).reshape(-1)
        # a linear map has its neurons in the rows of the weight, a product with x to its left in the columns
        rows = values.t() if values.dim() == 2 and not operation.startswith(("linear", "conv")) else values
        low, high = rows.reshape(len(rows), -1).aminmax(dim=1)
        half = (high - low) / 2
        scale, fan_in = None if bool((half == 1).all()) else half, values.numel() // len(rows)
        zeros = flat[whole(self.parameters[name]).reshape(-1) == 0]
        zero = int(zeros[0]) if len(zeros) else 1
        self._found[name] = Operand(name, *place, how, symmetric, transposed, fan_in, zero, flat, scale)


def _symmetric(values: Tensor) -> bool | None:
    """Tell whether the two values are -c and c in the tensor, each row or each column; ``None``: not binary."""
    views = [values.reshape(1, -1)]
    if values.dim() > 1:
        rows, columns = values.flatten(1), values.transpose(0, 1).flatten(1)
        # most float weights end here, after one row and one column
        if not any(_binary(line[:1], symmetric) for line in (rows, columns) for symmetric in (True, False)):
            return None
        views += [rows, columns]
    for symmetric in (True, False):
        for number, view in enumerate(views):
            if view.shape[1] >= _FEWEST and (symmetric or number < 2) and _binary(view, symmetric):
                return symmetric
    return None


def _binary(rows: Tensor, symmetric: bool) -> bool:
    """Tell whether each row has one distance from its middle, which is 0 if symmetric, but for a few exact zeros."""
    low, high = rows.aminmax(dim=1, keepdim=True)
    top = torch.maximum(low.abs(), high.abs())
    far = rows.abs() if symmetric else (rows - (low + high) / 2).abs()
    nearest, farthest = far.aminmax(dim=1, keepdim=True)
    if not bool(top.any()) or not bool(farthest.any()):
        return False
    if bool((farthest - nearest <= _TOLERANCE * top).all()):
        return True
    zero = rows == 0
    share = float(zero.float().mean())
    return 0 < share <= _MOST_ZEROS and bool(((farthest - far <= _TOLERANCE * top) | zero).all())


def _owner(
    operand: Tensor, signs: Tensor, parameters: Mapping[str, nn.Parameter], module: str
) -> tuple[str, How, bool] | None:
    """Return the parameter that an operand was made of, how that is known, and whether it was transposed."""
    same = {name: weight for name, weight in parameters.items() if weight.numel() == signs.numel()}
    own = {name: whole(weight).sign().to(torch.int8).reshape(-1) for name, weight in same.items()}
    for transposed in (False, True) if signs.dim() == 2 else (False,):
        flat = (signs.t() if transposed else signs).reshape(-1)
        for name, weight in same.items():
            # a constant has no pattern of signs to know it by
            if bool((own[name] * flat >= 0).all()) and bool(own[name].min() != own[name].max()):
                hidden = any(isinstance(v, Tensor) and v.shape == weight.shape for v in vars(weight).values())
                how: How = "graph" if hidden else "stored" if operand is weight else "sign"
                return name, how, transposed  # hidden: what every forward writes the parameter from anew
    leaves = _leaves(operand)
    behind = [name for name, weight in same.items() if id(weight) in leaves]
    sharded = any(map(is_sharded, same.values()))
    if not behind and (operand.grad_fn is None or sharded):  # no graph, or one of gathered copies: the module's own
        behind = [name for name in same if name.rpartition(".")[0] == module]
    if len(behind) != 1:
        return None
    shape = same[behind[0]].shape
    return behind[0], "graph", signs.dim() == 2 and signs.shape != shape == signs.t().shape


def _leaves(tensor: Tensor) -> set[int]:
    """Return the identities of the leaves of a tensor's autograd graph."""
    leaves, todo, done = {id(tensor)}, [tensor.grad_fn], set()
    while todo:
        function = todo.pop()
        if function is not None and function not in done:
            done.add(function)
            leaves.add(id(getattr(function, "variable", None)))
            todo += [following for following, _ in function.next_functions]
    return leaves
