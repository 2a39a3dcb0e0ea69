"""A plan as a file: what `attnres-rewrite partition -o` writes, laid upon the model that it was made for."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attnres_rewrite.errors import PartitionError, explain
from attnres_rewrite.module import RewrittenModule
from attnres_rewrite.pipeline.plan import PipelinePlan, hash_of_model, partition

_FIELDS = {
    "model_hash": str,
    "num_ranks": int,
    "num_virtual": int,
    "placement": str,
    "mode": str,
    "dropout": str,
    "cuts": list | tuple,
}


def load_plan(source: str | Path | Mapping[str, Any], new: RewrittenModule) -> PipelinePlan:
    """Cut a rewritten model as a saved plan says, such as one that was made on meta tensors.

    Args:
        source: The JSON file, or what `plan.to_dict()` returned.
        new: The model, captured on inputs of the same sizes; the device may be another.

    Raises:
        PartitionError: The plan is for another model or for other sizes, or the file is no plan.
    """
    facts = source if isinstance(source, Mapping) else _read(Path(source))
    missing = [name for name in _FIELDS if name not in facts]
    if missing:
        raise PartitionError(explain(f"the plan lacks {', '.join(missing)}", remedy="Make it again."))
    wrong = [f"{name} {facts[name]!r}" for name, kind in _FIELDS.items() if not isinstance(facts[name], kind)]
    if wrong:
        raise PartitionError(explain(f"the plan has {', '.join(wrong)}", remedy="Make it again."))
    num_ranks, num_virtual = facts["num_ranks"], facts["num_virtual"]
    options = {name: facts[name] for name in ("placement", "mode", "dropout")}
    try:
        plan = partition(new, num_ranks, num_virtual, cuts=tuple(facts["cuts"]), **options)
    except (PartitionError, ValueError) as error:
        own = hash_of_model(new)
        if own == facts["model_hash"]:
            raise PartitionError(explain("the plan was edited, and fits no more", why=str(error))) from error
        raise PartitionError(_for_another_model(facts["model_hash"], own)) from error
    if plan.model_hash != facts["model_hash"]:
        raise PartitionError(_for_another_model(facts["model_hash"], plan.model_hash))
    return plan


def _read(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PartitionError(explain(f"{path} is no plan", why=str(error))) from error
    if not isinstance(found, Mapping):
        raise PartitionError(explain(f"{path} is no plan", why=f"It holds a {type(found).__name__}."))
    return found


def _for_another_model(planned: str, own: str) -> str:
    return explain(
        "the plan is for another model, or for inputs of other sizes",
        None,
        f"Hash of the rewritten graph in the plan: {planned[:12]}, of this one: {own[:12]}.",
        "Plan again, or rewrite with the config and the example inputs of the plan.",
    )
