"""Run a traced forward again on moments over fault maps: mean and deviation of what depends on stored bits."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from bnnft.compensation.plan import is_map_with
from bnnft.evaluation.moments import Errors, Moments, expected_sign, sum_moments
from bnnft.injection.sites import Site
from bnnft.tracing.axis import RESHAPING
from bnnft.tracing.thresholds import batch_norm_arguments
from bnnft.tracing.trace import Node, Trace
from bnnft.tracing.ways import ADDING, Ways, is_map

# what moves values and changes none in eval mode
_SHAPING = RESHAPING | {"contiguous", "clone", "detach", "get", "to", "type", "type_as", "float", "double"}
_SHAPING |= {"dropout", "dropout1d", "alpha_dropout"}
_SCALING = {"mul", "imul", "rmul", "div", "idiv", "truediv", "itruediv", "neg", "multiply", "divide"}
_SIGN_KEEPING = {"hardtanh", "tanh", "softsign"}
_ORDER_KEEPING = {"softmax", "log_softmax"}
_NONE = Errors((0.0, 0.0))
_CONVOLUTION = (
    "a flip in a small kernel moves a whole channel at all of its positions: its noise is shared, discrete and another "
    "one in each map, and closed forms were 2 to 23 points off (measured). Measure it with accuracy_over_ber"
)


class Propagation:
    """The part of a traced forward that depends on stored bits, to be run on moments, for any errors.

    Args:
        trace: of one forward in eval mode.
        output: that it returned.
        sites: whose bits have errors.

    Raises:
        ValueError: the output does not depend on them, or on something that has no closed form here; which and why.
    """

    def __init__(self, trace: Trace, output: Tensor, sites: Sequence[Site]) -> None:
        self._trace, self._ways = trace, Ways(trace)
        self._maps: dict[int, tuple[Node, Site]] = {}
        for node in trace.nodes:
            for site in sites:
                if is_map_with(node, site) or (is_map(node) and node.module == site.layer and "conv" in node.operation):
                    self._maps[node.outputs[0]] = node, site
        self._uncertain = self._ways.behind(self._maps)
        self._makers: dict[int, Node] = {}
        for node in trace.nodes:
            for value in node.outputs:
                self._makers.setdefault(value, node)
        self._before_sign = self._neurons()
        self._signs = {after: _size_of_signs(trace, before, after) for after, before in self._before_sign.items()}
        self._certain: dict[int, Tensor] = {}  # sums of what is the same under all errors
        self._output = trace.number(output)
        self._order = self._needed()

    def moments(self, errors: Mapping[str, Errors]) -> Moments:
        """Return the moments of the output.

        Args:
            errors: of the bits of each site, by its name; none of sites that are left out.
        """
        known: dict[int, Moments] = {}
        for value in self._order:
            if value in self._before_sign:
                known[value] = self._sign(value, known)
            elif value in self._maps:
                node, site = self._maps[value]
                known[value] = self._linear(value, node, known, errors.get(site.name, _NONE))
            else:
                known[value] = self._passed(self._makers[value], value, known)
        return known[self._output]

    def _neurons(self) -> dict[int, int]:
        """Return for the first binary value behind each layer the value whose sign it is."""
        found = {}
        for start in self._maps:
            way = self._ways.to_neurons(start)
            first = next((place for place, step in enumerate(way) if self._ways.signs(step.made)), None)
            if first is not None:
                source = first
                while source and way[source - 1].node.operation in _SIGN_KEEPING:
                    source -= 1
                found[way[first].made] = way[source].given
        return found

    def _needed(self) -> list[int]:
        """Return the uncertain values that the output is made of, in the order in which they were."""
        if self._output not in self._uncertain:
            raise ValueError(f"the answers of {type(self._trace.model).__name__} do not depend on binarized weights")
        needed, todo = set[int](), [self._output]
        while todo:
            value = todo.pop()
            if value in needed or value not in self._uncertain:
                continue
            needed.add(value)
            node = self._makers[value]
            todo += [self._before_sign[value]] if value in self._before_sign else self._checked(node, value)
        places = {value: place for place, node in enumerate(self._trace.nodes) for value in node.outputs}
        return sorted(needed, key=lambda value: places[value])

    def _checked(self, node: Node, value: int) -> Sequence[int]:
        """Return the inputs of an operation.

        Raises:
            ValueError: it has no closed form here.
        """
        uncertain = [number for number in node.inputs if number in self._uncertain]
        name = f"{node.module or type(self._trace.model).__name__} ({node.operation.removeprefix('@')})"
        reason = ""
        if "conv" in node.operation:
            reason = _CONVOLUTION
        elif value in self._maps:
            reason = "" if uncertain in ([], [node.inputs[0]]) else "both of its operands depend on stored bits"
        elif node.operation in ADDING:
            distinct = len(set(uncertain)) == len(uncertain) and "addc" not in node.operation
            reason = "" if distinct else "it adds a value to itself"
        elif node.operation == "batch_norm":
            fixed = self._trace.thresholds.get(value) is not None
            reason = "" if fixed else "it has no running statistics or does not use them (call eval())"
        elif node.operation not in _SHAPING | _SCALING | _ORDER_KEEPING or len(uncertain) > 1:
            reason = "mean and variance have no closed form behind it here"
        if reason:
            raise ValueError(f"accuracy over BER can't be predicted through {name}: {reason}")
        return node.inputs

    def _sign(self, value: int, known: Mapping[int, Moments]) -> Moments:
        """Return the moments of binary outputs."""
        source, size = known[self._before_sign[value]], self._signs[value]
        return Moments(size * expected_sign(source.mean, source.spread), second=size.square())

    def _linear(self, value: int, node: Node, known: Mapping[int, Moments], errors: Errors) -> Moments:
        """Return the moments of a linear layer's sums, as derived above."""
        assert node.call is not None
        function, args, kwargs = node.call
        bias = kwargs.get("bias", args[2] if len(args) > 2 else None)
        inputs, sums = known.get(node.inputs[0]), self._certain.get(value)
        if inputs is None:
            certain = self._trace.values[node.inputs[0]]
            inputs = Moments(certain, torch.zeros((), dtype=certain.dtype, device=certain.device), certain.square())
            if sums is None:
                self._certain[value] = sums = function(inputs.mean, args[1])
        moments = sum_moments(node.operation, inputs, args[1], errors, sums)
        return moments if bias is None else moments._replace(mean=moments.mean + bias)

    def _passed(self, node: Node, value: int, known: Mapping[int, Moments]) -> Moments:
        """Return the moments behind an operation that is linear in what is uncertain."""

        def run(part: Callable[[Moments], Tensor], certain: bool = True) -> Tensor:
            def put(number: int) -> Tensor:
                if number in known:
                    moved = part(known[number])
                    return moved.clone() if node.written else moved
                other = self._trace.values[number]
                return other if certain else torch.zeros_like(other)

            return node.run(put)[value]

        if node.operation in _ORDER_KEEPING:
            return known[node.inputs[0]]
        mean = run(lambda moments: moments.mean)
        if node.operation in ADDING:
            variance = run(lambda moments: moments.spread.square().expand_as(moments.mean), certain=False)
            return Moments(mean, variance.abs().sqrt())
        (given,) = (known[number] for number in set(node.inputs) if number in known)
        if node.operation == "batch_norm":
            return Moments(mean, given.spread * _scale_of_norm(node, mean.dim()))
        if node.operation in _SHAPING:
            second = given.second if given.second is not None and not given.second.dim() else None
            if second is not None:
                return Moments(mean, second=second)
            return Moments(mean, run(lambda moments: moments.spread.expand_as(moments.mean)))
        # what is scaled: by the difference of where it puts a standard deviation and zero
        deviation = run(lambda moments: moments.spread.expand_as(moments.mean))
        return Moments(mean, (deviation - run(lambda moments: torch.zeros_like(moments.mean))).abs())


def _scale_of_norm(node: Node, dims: int) -> Tensor:
    given = batch_norm_arguments(*(node.call or (None, (), {})))
    scale: Tensor = (given["running_var"] + given["eps"]).rsqrt()
    if given["weight"] is not None:
        scale = scale * given["weight"].abs()
    return scale.view(-1, *[1] * (dims - 2))


def _size_of_signs(trace: Trace, before: int, after: int) -> Tensor:
    """Return the size of binary outputs, negative where they are the sign of a value turned round."""
    values, signs = (trace.values[number].detach() for number in (before, after))
    return signs.abs().amax() * (signs.sign() * values.sign()).sum().sign()
