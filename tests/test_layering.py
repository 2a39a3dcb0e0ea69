"""The import rules of ARCHITECTURE.md, checked on the source text (nothing is imported)."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "attnres_rewrite"

# From the bottom up. A module may import its own level and what is below it, but for the EXCEPTIONS.
LEVELS = (
    {"errors", "version", "source_lines"},
    {
        "config",
        "records",
        "fxgraph",
        "inputs",
        "trace_conditions",
        "copying",
        "moving",
        "model_state",
        "host_random",
        "mark",
        "dynamo_skips",
        "whole_folder",
        "kernels",
        "functional",
        "keyed_random",
        "inductor_fix",
    },
    {
        "capture",
        "export_routes",
        "dynamo_graph",
        "model_caches",
        "module",
        "passes",
        "report",
        "verify",
        "sizes_of_one",
        "lifted",
        "witness",
        "training_ir",
        "example_inputs",
        "sublayers",
        "diagnosis",
    },
    {
        "pipeline",
        "artifact",
        "graph_json",
        "program_json",
        "tensor_tree",
        "read_parameters",
        "first_values",
        "carried_config",
        "saved_reads",
        "api",
        "batches",
        "baseline",
        "example_values",
        "taps",
        "running_figures",
        "diagnose",
        "plots",
        "plot_style",
        "page",
        "unflatten",
    },
    {"attached_parts", "attached_reads", "attachment", "attached_rewrite", "backend", "cli"},
    {"__init__", "__main__"},
)
FACTS = {"errors", "config", "records", "fxgraph", "inputs", "copying", "model_state", "module", "report"}
PROOFS = FACTS | {"verify", "lifted", "witness"}
# The proofs share no code with what they prove: no pass, no kernel. The command line uses what every user
# has, and nothing else.
EXCEPTIONS = {
    "kernels": {"kernels", "errors"},
    "functional": {"functional", "kernels"},
    "verify": PROOFS,
    "lifted": PROOFS,
    "witness": PROOFS,
    "cli": {
        "cli",
        "__init__",
        "errors",
        "source_lines",
        "report",
        "example_inputs",
        "carried_config",
        "diagnosis",
        "plots",
        "moving",
    },
}
ONLY_IN = {
    "triton": {"kernels"},
    "rich": {"cli"},
    "typer": {"cli"},
    "transformers": {"artifact", "cli"},
    "jinja2": {"page"},
    "networkx": {"passes", "pipeline"},
    "matplotlib": {"plots", "plot_style", "pipeline"},
}


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def allowed_for(layer: str) -> set[str]:
    if layer in EXCEPTIONS:
        return EXCEPTIONS[layer]
    height = next(height for height, level in enumerate(LEVELS) if layer in level)
    return set().union(*LEVELS[: height + 1])


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write the import in full"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def imported_layer(name: str) -> str:
    """Name the layer of an import: attnres_rewrite.errors.RewriteError -> errors."""
    first = name.split(".")[1] if "." in name else "__init__"
    known = set().union(*LEVELS)
    return first if first in known else "__init__"


def test_every_module_has_a_level():
    modules = {layer_of(path) for path in PACKAGE.rglob("*.py")}
    assert modules <= set().union(*LEVELS)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_follow_the_layers(path):
    layer = layer_of(path)
    for name in imports_of(path):
        root = name.split(".")[0]
        if root in ONLY_IN:
            assert layer in ONLY_IN[root], f"{root} may be imported in {' and '.join(ONLY_IN[root])} only"
        if root == "attnres_rewrite":
            other = imported_layer(name)
            assert other in allowed_for(layer), f"{layer} may not import {other}"
