"""A diagnosis and the report it stands beside -> what the page says of how its plots were made."""

from dataclasses import replace

from attnres_rewrite.config import AttnResConfig, config_from, describe_config
from attnres_rewrite.diagnosis import Diagnosis
from attnres_rewrite.errors import ArtifactError, explain
from attnres_rewrite.report import RewriteReport

UNKNOWN = "not recorded by the release that made the diagnosis"
LOSSES = {"given": "of a loss_fn that was given", "default": "the outputs' own, or the next-token cross-entropy"}
ORIGINALS = {"own": "the original with the same parameters", "given": "a twin that was trained without the rewrite"}


def learnt_terms(diagnosis: Diagnosis) -> list[tuple[str, str]]:
    """Return what was run, as terms and what they mean."""
    losses = LOSSES.get(diagnosis.loss_kind, UNKNOWN)
    original = ORIGINALS.get(diagnosis.baseline, "not run")
    if diagnosis.baseline_loss is not None:
        original += f", with a loss of {diagnosis.baseline_loss:.4f}"
    config = UNKNOWN if diagnosis.config is None else _config_text(diagnosis.config)
    return [
        ("Mode", diagnosis.mode),
        ("Batches", _batches_text(diagnosis)),
        ("Loss", f"{'none finite' if diagnosis.loss is None else f'{diagnosis.loss:.4f}'}: {losses}"),
        ("Original", original),
        ("Choices", config),
    ]


def _batches_text(diagnosis: Diagnosis) -> str:
    counted = f"{diagnosis.num_batches:,}, with {diagnosis.num_tokens:,} tokens in the figures"
    if not diagnosis.num_nonfinite:
        return counted
    which = ", ".join(map(str, diagnosis.nonfinite_batches))
    more = ", ..." if len(diagnosis.nonfinite_batches) < diagnosis.num_nonfinite else ""
    return f"{counted}; {diagnosis.num_nonfinite:,} not finite and in no figure, counted from 0: {which}{more}"


def _config_text(config: AttnResConfig) -> str:
    return ", ".join(f"{name}={value}" for name, value in describe_config(config).items() if value is not None)


def check_same_network(diagnosis: Diagnosis, report: RewriteReport) -> None:
    """Refuse a diagnosis of other reads than those of the report: their names, what they mix and how, or their width.

    Raises:
        ArtifactError: They differ.
    """
    if why := _why_another(diagnosis, report):
        raise ArtifactError(
            explain("this is the diagnosis of another model", None, why, "Diagnose this one, with the same options.")
        )


def _why_another(diagnosis: Diagnosis, report: RewriteReport) -> str | None:
    seen = [(read.name, len(read.sources)) for stream in diagnosis.streams for read in stream.reads]
    wanted = [(read.query_name.removesuffix(".query"), read.num_sources) for read in report.reads]
    differs = next((pair for pair in zip(seen, wanted, strict=False) if pair[0] != pair[1]), None)
    if differs is not None:
        (name, count), (own_name, own_count) = differs
        return f"It has {name} with {count} sources where {report.model} has {own_name} with {own_count}."
    widths, own_widths = ([stream.width for stream in of.streams] for of in (diagnosis, report))
    if (len(seen), widths) != (len(wanted), own_widths):
        return f"It has {len(seen)} reads of widths {widths}, and {report.model} has {len(wanted)} of {own_widths}."
    if diagnosis.config is None:
        return None
    mixes, own_mixes = _mix_of(diagnosis.config), _mix_of(config_from(report.config))
    if mixes != own_mixes:
        return f"Its reads mix with {_config_text(mixes)}, and those of {report.model} with {_config_text(own_mixes)}."
    return None


def _mix_of(config: AttnResConfig) -> AttnResConfig:
    """Return the choices that make other figures; blocks may be asked for in several ways, and reads are compared."""
    return replace(config, num_blocks=None, block_size=None, block_layers=None, schedule="auto", param_dtype=None)
