"""A plan as a file: what `attnres-rewrite partition -o` writes, laid upon the model that it was made for."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attnres_rewrite.errors import PartitionError, explain
from attnres_rewrite.module import RewrittenModule
from attnres_rewrite.pipeline.plan import PipelinePlan, partition

_FIELDS = ("model_hash", "num_ranks", "num_virtual", "placement", "mode", "dropout", "cuts")


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
    num_ranks, num_virtual = facts["num_ranks"], facts["num_virtual"]
    options = {name: facts[name] for name in ("placement", "mode", "dropout")}
    try:
        plan = partition(new, num_ranks, num_virtual, cuts=tuple(facts["cuts"]), **options)
    except PartitionError as error:
        raise PartitionError(_for_another_model(facts["model_hash"], None)) from error
    if plan.model_hash != facts["model_hash"]:
        raise PartitionError(_for_another_model(facts["model_hash"], plan.model_hash))
    return plan


def _read(path: Path) -> Mapping[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PartitionError(explain(f"{path} is no plan", why=str(error))) from error


def _for_another_model(planned: str, own: str | None) -> str:
    return explain(
        "the plan is for another model, or for inputs of other sizes",
        None,
        f"Hash of the rewritten graph in the plan: {planned[:12]}"
        + (f", of this one: {own[:12]}." if own else "; it cuts at reads that this one lacks."),
        "Plan again, or rewrite with the config and the example inputs of the plan.",
    )
