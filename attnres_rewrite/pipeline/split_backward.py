"""Give a joint of their own to the parameters whose gradients torch's split backward would get wrong.

    linear(x, w), linear(y, w + 1)     ->     w' = joined(w, x); linear(x, w'), linear(y, w' + 1)

A split backward works out the gradients of the inputs first. For each parameter, torch finds where its effect joins
what depends on the inputs, keeps the gradients there, and goes on from them later. An effect that reaches an output
without joining is lost, parameters whose joints overlap without being the same may be counted twice, and one that joins
at several places frees what lies between them, where others still wait. All happen: the decoder's embedding in a later
stage; a shared weight beside biases that are not; the queries of one phase 1; a norm or a layer that is used twice.

A parameter that passes `joined` joins at once, in one place of its own. Its gradient is complete with those of the
inputs; all others wait as the schedule has it.
"""

from typing import Any

import torch
from torch import Tensor, fx, nn

from attnres_rewrite.fxgraph import can_learn, is_floating, op_name, tensor_of


class _Joint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor, value: Tensor) -> Tensor:
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None


def joined(parameter: Tensor, value: Tensor) -> Tensor:
    """Return the parameter; to autograd it depends on `value`, with a gradient of nothing."""
    return _Joint.apply(parameter, value)  # type: ignore[no-any-return]


def join_parameters(module: fx.GraphModule, num_inputs: int) -> tuple[str, ...]:
    """Give joints to those that need one, in place; return their names.

    Args:
        module: A stage that receives something.
        num_inputs: Of its placeholders, those that are inputs of the model; the others are received.
    """
    received = [node for node in module.graph.find_nodes(op="placeholder")[num_inputs:] if is_floating(node)]
    names = _unsafe(module, received)
    for node in module.graph.find_nodes(op="get_attr"):
        if str(node.target) in names:
            with module.graph.inserting_after(node):
                new = module.graph.call_function(joined, (node, received[0]))
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new, delete_user_cb=lambda user, kept=new: user is not kept)
    module.recompile()
    return tuple(sorted(names))


# ops with a gradient for all that they are given; another one may use the received value for its shape or dtype alone
_JOINTS = frozenset(
    """add sub mul div linear matmul mm bmm addmm baddbmm _grouped_mm conv1d conv2d conv3d convolution layer_norm
    rms_norm group_norm batch_norm block_attn_res inter_block merge add_merge_norm""".split()
)


def _unsafe(module: fx.GraphModule, received: list[fx.Node]) -> set[str]:
    """Return the trainable parameters that have no joint, several, or one that others have beside another."""
    behind = set(received)
    origins: dict[fx.Node, frozenset[str]] = {}
    joints: dict[str, set[fx.Node]] = {}
    lost: set[str] = set()
    for node in module.graph.nodes:
        own = frozenset(name for entry in node.all_input_nodes for name in origins.get(entry, ()))
        value = tensor_of(node)
        if node.op == "get_attr" and _is_trainable(module, str(node.target)):
            origins[node] = frozenset([str(node.target)])
        elif node.op == "output":
            lost |= own
        elif op_name(node) == "detach" or (value is not None and not can_learn(value)):
            continue  # no gradient goes through it
        elif any(entry in behind for entry in node.all_input_nodes):
            behind.add(node)
            for name in own:
                joints.setdefault(name, set()).add(node)
            lost |= own if op_name(node) not in _JOINTS else frozenset()
        elif node not in behind:
            origins[node] = own
    several = {name for name, places in joints.items() if len(places) > 1}
    return lost | several | _overlapping(joints)


def _is_trainable(module: nn.Module, name: str) -> bool:
    owner, _, leaf = name.rpartition(".")
    value = module.get_submodule(owner)._parameters.get(leaf)
    return value is not None and value.requires_grad


def _overlapping(joints: dict[str, set[fx.Node]]) -> set[str]:
    found: set[str] = set()
    at: dict[fx.Node, list[str]] = {}
    for name, places in joints.items():
        for place in places:
            at.setdefault(place, []).append(name)
    for names in at.values():
        if any(joints[name] != joints[names[0]] for name in names):
            found |= set(names)
    return found
