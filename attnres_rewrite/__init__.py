"""Rewrite the residual stream of any pre-norm transformer into Block Attention Residuals, and prove it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from attnres_rewrite.api import inspect, rewrite, verify
from attnres_rewrite.artifact import load, save
from attnres_rewrite.attached_rewrite import as_rewritten
from attnres_rewrite.attachment import attach, detach, original
from attnres_rewrite.backend import reset_stats, stats
from attnres_rewrite.config import AttnResConfig
from attnres_rewrite.diagnose import depth_weights, diagnose
from attnres_rewrite.diagnosis import Diagnosis
from attnres_rewrite.errors import (
    AlreadyRewrittenError,
    ArtifactError,
    CaptureError,
    CheckpointError,
    GraphBreakError,
    MissingPackageError,
    ModelSpecError,
    ModeMismatchError,
    NoStreamError,
    NotAttachedError,
    NotCompiledError,
    NotRewrittenError,
    ParallelStreamsError,
    PartitionError,
    PipelineFailedError,
    PostNormError,
    ProofError,
    RewriteError,
    StreamMismatchError,
    StreamRegionError,
    UnpreservedReadError,
)
from attnres_rewrite.module import RewrittenModule
from attnres_rewrite.page.html_report import html_report
from attnres_rewrite.pipeline.plan import PipelinePlan, partition
from attnres_rewrite.pipeline.saved_plan import load_plan
from attnres_rewrite.pipeline.schedules import placement_for
from attnres_rewrite.read_parameters import attnres_parameters, load_attnres_parameters
from attnres_rewrite.report import RewriteReport, VerifyReport
from attnres_rewrite.unflatten import unflatten
from attnres_rewrite.version import __version__

if TYPE_CHECKING:
    from attnres_rewrite.first_values import initialize
    from attnres_rewrite.pipeline.build import build_pipeline
    from attnres_rewrite.pipeline.picture import draw_pipeline
    from attnres_rewrite.pipeline.pipeline import Pipeline

__all__ = [
    "__version__",
    "AlreadyRewrittenError",
    "ArtifactError",
    "AttnResConfig",
    "CaptureError",
    "CheckpointError",
    "Diagnosis",
    "GraphBreakError",
    "MissingPackageError",
    "ModeMismatchError",
    "ModelSpecError",
    "NoStreamError",
    "NotAttachedError",
    "NotCompiledError",
    "NotRewrittenError",
    "PartitionError",
    "Pipeline",
    "PipelineFailedError",
    "PipelinePlan",
    "ParallelStreamsError",
    "PostNormError",
    "ProofError",
    "RewriteError",
    "RewriteReport",
    "RewrittenModule",
    "StreamMismatchError",
    "StreamRegionError",
    "UnpreservedReadError",
    "VerifyReport",
    "as_rewritten",
    "attach",
    "attnres_parameters",
    "build_pipeline",
    "depth_weights",
    "detach",
    "draw_pipeline",
    "diagnose",
    "html_report",
    "initialize",
    "inspect",
    "load",
    "load_attnres_parameters",
    "load_plan",
    "original",
    "partition",
    "placement_for",
    "reset_stats",
    "rewrite",
    "save",
    "stats",
    "unflatten",
    "verify",
]


_DISTRIBUTED = {
    "Pipeline": "pipeline.pipeline",
    "build_pipeline": "pipeline.build",
    "draw_pipeline": "pipeline.picture",
    "initialize": "first_values",
}


def __getattr__(name: str) -> Any:
    """Import what needs torch.distributed when it is asked for: not every build of torch has it."""
    if name in _DISTRIBUTED:
        return getattr(import_module(f"attnres_rewrite.{_DISTRIBUTED[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
