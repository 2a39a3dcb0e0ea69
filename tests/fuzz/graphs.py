"""Which module a node of a captured graph belongs to."""

from torch import fx


def innermost_module(node: fx.Node) -> str:
    """Return the FQN of the innermost module whose forward made `node`."""
    stack = node.meta.get("nn_module_stack") or {}
    fqn = next(reversed(stack.values()))[0] if stack else ""
    # the n-th call of a shared module is spelled "layers.0@n"
    return ".".join(part.split("@")[0] for part in fqn.split("."))
