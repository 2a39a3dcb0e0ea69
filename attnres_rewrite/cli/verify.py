"""attnres-rewrite verify: a saved rewrite, or a model rewritten in memory -> the proofs' figures."""

import typer

import attnres_rewrite as ar
from attnres_rewrite.cli import options, render
from attnres_rewrite.cli.rewriting import rewritten
from attnres_rewrite.errors import ProofError, explain

EXAMPLES = (
    "verify gpt.attnres",
    "verify examples/gpt.py --blocks full",
    "verify ./Qwen3-0.6B --json",
)


@options.plans()
def verify(
    model: options.Model,
    config: "ar.AttnResConfig",
    meta: options.Meta = False,
    batch: options.Batch = None,
    seq: options.Seq = None,
    device: options.Device = None,
    as_json: options.AsJson = False,
) -> None:
    """Prove a saved rewrite again, or rewrite MODEL in memory and prove that. Saves nothing.

    Exit status: 0 proven, 1 refused with a reason or not proven, 2 wrong arguments.
    """
    options.refuse_meta(meta, "verify")
    found = options.load_model(model, config, meta, batch, seq, device)
    with render.working("capture") as stage:
        new = rewritten(found, config, stage, verify=True)
        figures = ar.verify(new, progress=stage) if found.kind == "rewrite" else new.report.verify
    assert figures is not None
    failure = None if figures.passed else ProofError(explain(f"{model} is not proven", why=_failed(figures)))
    if as_json:
        render.facts({"model": new.report.model, **figures.to_dict()} | render.error_facts(failure))
    else:
        render.proofs(figures)
        if failure is not None:
            render.problem(failure, as_json=False)
    if failure is not None:
        raise typer.Exit(1)


def _failed(figures: "ar.VerifyReport") -> str:
    failed = [f"{proof.name} ({proof.mode})" for proof in figures.proofs if not proof.passed]
    return f"failed: {', '.join(failed)}" if failed else "no proof could be run"
