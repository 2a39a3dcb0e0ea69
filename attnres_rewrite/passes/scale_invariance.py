"""Which states of a stream have a consumer that depends on their scale.

The mean of n sources is the running sum divided by n. A consumer gives the same result when it is
homogeneous of degree 0 in the state: a norm is. The degree is carried forward through the graph:

    norm -> 0    linear without bias, views, relu -> kept    mul -> sum    pow(p) -> times p    x + eps -> kept
    adding values of different degrees, silu, softmax, linear with bias -> not homogeneous

A state is preserved when every branch added to its stream, and every output, has degree 0 in it.
The root is exempt: with one source a read is the identity.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from attnres_rewrite.fxgraph import argument, has_one_element, op_name, place_of
from attnres_rewrite.passes.carriers import CASTS, DROPOUTS, VIEWS

LARGEST_EPS = 1e-3  # a constant up to this size, added inside a norm, is taken for its eps

_KEEPS_DEGREE = (
    VIEWS
    | CASTS
    | DROPOUTS
    | frozenset(
        """neg sum mean slice select expand getitem cumsum roll flip pad constant_pad_nd split chunk unbind
        split_with_sizes narrow repeat repeat_interleave expand_as abs relu amax amin max min leaky_relu tril triu
        diagonal unfold std avg_pool1d avg_pool2d adaptive_avg_pool1d adaptive_avg_pool2d max_pool2d norm vector_norm
        linalg_vector_norm detach index_fill as_strided im2col pixel_unshuffle pixel_shuffle tensor_split
        upsample_bilinear2d upsample_nearest2d diag_embed topk sort""".split()
    )
)
_SELECTS = frozenset("gather index index_select take_along_dim".split())
_NORMS = frozenset(
    """layer_norm rms_norm native_layer_norm group_norm instance_norm normalize native_group_norm cosine_similarity
    _fused_rms_norm sign argmax argmin argsort""".split()
)
_NO_VALUE = frozenset(
    """zeros_like ones_like empty_like full_like new_zeros new_ones new_empty new_full sym_size size numel
    _assert_tensor_metadata rand_like randn_like bernoulli check_inputs""".split()
)
_COMPARES = frozenset("gt lt ge le eq ne".split())
_ZEROS = frozenset("zeros zeros_like new_zeros".split())
_PRODUCTS = frozenset("matmul bmm mm dot mv".split())


@dataclass(frozen=True, slots=True)
class NotHomogeneous:
    """The value of a node that no power of the scale describes, and the first op that made it so."""

    culprit: str


Degree = float | NotHomogeneous
Degrees = dict[fx.Node, Degree]  # state -> degree; an absent state has degree 0


def scale_culprits(
    nodes: Sequence[fx.Node], states: Sequence[fx.Node], stream_edges: dict[fx.Node, int]
) -> dict[fx.Node, str]:
    """Return the states some consumer of which depends on their scale, with the first such consumer.

    Args:
        nodes: The whole graph, in order.
        states: The states to follow, of all streams; roots are left out by the caller.
        stream_edges: For each update's add, the position of the operand that is on the stream.
    """
    followed = set(states)
    degrees: dict[fx.Node, Degrees] = {}
    culprits: dict[fx.Node, str] = {}
    for node in nodes:
        if node in stream_edges:
            branch = node.args[1 - stream_edges[node]]
            _blame(culprits, degrees.get(branch, {}), node)  # type: ignore[arg-type]
            degrees[node] = {node: 1.0} if node in followed else {}
        elif node.op == "output":
            for value in node.all_input_nodes:
                _blame(culprits, degrees.get(value, {}), node)
        elif any(degrees.get(source) for source in node.all_input_nodes):
            degrees[node] = _degrees_of(node, degrees)
        if node in followed:
            degrees[node] = degrees.get(node, {}) | {node: 1.0}
    return culprits


def _blame(culprits: dict[fx.Node, str], degrees: Degrees, consumer: fx.Node) -> None:
    for state, degree in degrees.items():
        if isinstance(degree, NotHomogeneous):
            culprits.setdefault(state, degree.culprit)
        elif degree != 0:
            where = "an output of the model" if consumer.op == "output" else f"the add at {place_of(consumer)}"
            culprits.setdefault(state, f"{where} takes it without a norm")


def _degrees_of(node: fx.Node, degrees: dict[fx.Node, Degrees]) -> Degrees:
    states = {state: None for source in node.all_input_nodes for state in degrees.get(source, {})}
    result: Degrees = {}
    for state in states:

        def degree(value: Any, state: fx.Node = state) -> Degree:
            return degrees.get(value, {}).get(state, 0.0) if isinstance(value, fx.Node) else 0.0

        inputs = [degree(source) for source in node.all_input_nodes]
        known = [value for value in inputs if isinstance(value, NotHomogeneous)]
        if op_name(node) in _NO_VALUE:
            continue
        value = known[0] if known else degree_of(node, degree)
        if value is None:
            value = NotHomogeneous(f"{op_name(node)} at {place_of(node)} depends on its scale")
        if value != 0.0:
            result[state] = value
    return result


def degree_of(node: fx.Node, degree: Callable[[Any], Degree]) -> float | None:
    """Return the degree of a node given those of its inputs, none of them NotHomogeneous; None: it has none."""

    def of(position: int, name: str) -> float:
        found = degree(argument(node, position, name))
        assert isinstance(found, float | int)
        return found

    name = op_name(node)
    inputs: list[Any] = [degree(source) for source in node.all_input_nodes]
    if all(value == 0 for value in inputs) or name in _NORMS:
        return 0.0
    if name in _KEEPS_DEGREE:
        return of(0, "self")
    if name in _SELECTS:
        rest = [degree(source) for source in node.all_input_nodes if source is not node.args[0]]
        return of(0, "self") if not any(rest) else None
    if name in _POWERS:
        return _POWERS[name] * of(0, "self")
    if name == "pow":
        exponent = argument(node, 1, "exponent")
        return of(0, "self") * exponent if isinstance(exponent, int | float) else None
    if name == "mul" or name in _PRODUCTS:
        return of(0, "self") + of(1, "other")
    if name == "div":
        return of(0, "self") - of(1, "other")
    if name == "einsum":
        return sum(inputs)
    if name in ("cat", "stack", "concat"):
        parts: set[Any] = {degree(part) for part in node.args[0] if op_name(part) not in _ZEROS}  # type: ignore[union-attr]
        return parts.pop() if len(parts) == 1 else None
    if name in ("add", "sub"):
        return _degree_of_sum(node, of)
    return _degree_of_layer(node, name, of)


_POWERS = {"var": 2.0, "square": 2.0, "sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1.0}


def _degree_of_sum(node: fx.Node, of: Callable[[int, str], float]) -> float | None:
    first, second = argument(node, 0, "self"), argument(node, 1, "other")
    left, right = of(0, "self"), of(1, "other")
    for value, own, other_degree in ((first, right, left), (second, left, right)):
        if isinstance(value, int | float):
            return own if abs(value) <= LARGEST_EPS else None
        if op_name(value) in _ZEROS:
            return own
        if other_degree == 0 and own == 2 and has_one_element(value) and value.op == "get_attr":
            return own  # an eps kept in a buffer
    return left if left == right else None


def _degree_of_layer(node: fx.Node, name: str, of: Callable[[int, str], float]) -> float | None:
    if name == "linear" or name in ("conv1d", "conv2d", "conv3d", "convolution"):
        bias, weight = argument(node, 2, "bias"), of(1, "weight")
        return of(0, "input") if bias is None and weight == 0 else None
    if name in ("clamp", "clamp_min"):
        low, high = argument(node, 1, "min"), argument(node, 2, "max")
        is_eps = isinstance(low, int | float) and 0 <= low <= LARGEST_EPS
        return of(0, "self") if is_eps and high is None else None
    if name in _COMPARES:
        other = argument(node, 1, "other")
        equal = other == 0 if isinstance(other, int | float) else of(0, "self") == of(1, "other")
        return 0.0 if equal else None
    if name == "scaled_dot_product_attention":
        return of(2, "value") if of(0, "query") + of(1, "key") == 0 else None
    if name == "where":
        return of(1, "self") if of(0, "condition") == 0 and of(1, "self") == of(2, "other") else None
    if name == "masked_fill":
        return of(0, "self") if argument(node, 2, "value") == 0 else None
    return None
