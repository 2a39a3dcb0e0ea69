"""Every error this package raises on purpose.

    RewriteError                  a refusal: the model was understood, and the rewrite would be wrong or useless
      CaptureError                the model could not be traced to one graph
        GraphBreakError           no one graph holds the stream: its Python control flow depends on tensor values
      NoStreamError               the graph holds no residual stream
        PostNormError             the stream passes through a norm between updates (x = norm(x + f(x)))
        ParallelStreamsError      several streams feed each other (hyper-connections, AltUp, reversible layers)
      AlreadyRewrittenError       the model has Attention Residuals already
      UnpreservedReadError        output="mean" would change what a consumer of the stream computes
      StreamRegionError           a part of the stream lies where gradients are off or autocast is on
      ModeMismatchError           train mode and eval mode build different streams
      NotAttachedError            torch.compile(backend="attnres") met a model that attach() does not know
      NotCompiledError            an attached model was about to run as the network it was before
      StreamMismatchError         a compiled call has another stream than attach() found
      ProofError                  a proof failed: the rewritten graph is not the function it must be
      PartitionError              a rewritten model cannot be cut into these pipeline stages
      NotRewrittenError           diagnose() was given something that rewrite() did not return
      CheckpointError             the values given are those of another model
      MissingPackageError         an optional package is not installed
      ModelSpecError              a MODEL argument of the command line gives no model
      ArtifactError               a saved folder is damaged, foreign, or would be overwritten; a file cannot be written

Wrong arguments are a plain ValueError or TypeError. PipelineFailedError, a RuntimeError, ends a step on every other
rank when one rank of a pipeline failed.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path


class RewriteError(Exception):
    """Base class: `except RewriteError` catches every deliberate refusal."""


class CaptureError(RewriteError):
    """No capture mode could trace the model with the example inputs given."""


class GraphBreakError(CaptureError):
    """The Python control flow of the model depends on tensor values, so that no one graph holds the stream."""


class NoStreamError(RewriteError):
    """No chain of residual adds runs through the captured graph."""


class PostNormError(NoStreamError):
    """Every update is followed by a norm of the sum, so no sum of updates exists."""


class ParallelStreamsError(NoStreamError):
    """Several streams exchange updates otherwise than through norms, so none of them is the residual stream."""


class AlreadyRewrittenError(RewriteError):
    """The model mixes its depth by attention already."""


class UnpreservedReadError(RewriteError):
    """A consumer of the stream depends on its scale, which output="mean" changes."""


class StreamRegionError(RewriteError):
    """A part of the stream lies in a region of the forward that sets gradients or autocast anew."""


class ModeMismatchError(RewriteError):
    """The streams found in train mode and in eval mode are not the same."""


class NotAttachedError(RewriteError):
    """The backend was given a model that has no reads: attach() was not called."""


class NotCompiledError(RewriteError):
    """An attached model runs without the backend, so its reads would be left out."""


class StreamMismatchError(RewriteError):
    """A compiled call of an attached model has another stream than the one its reads belong to."""


class ProofError(RewriteError):
    """The rewritten graph does not compute what a proof demands."""


class PartitionError(RewriteError):
    """A rewritten model cannot be cut into the pipeline stages that were asked for."""


class NotRewrittenError(RewriteError):
    """What was given has no reads to look at: it is no result of rewrite() or load()."""


class CheckpointError(RewriteError):
    """A state dict has other names or shapes than the model that is to take it."""


class MissingPackageError(RewriteError):
    """What was asked for needs a package of an extra that is not installed."""


class ModelSpecError(RewriteError):
    """A MODEL argument names nothing that gives a model."""


class ArtifactError(RewriteError):
    """What was saved cannot be read, or cannot be written where asked."""


class PipelineFailedError(RuntimeError):
    """Another rank of the pipeline failed; the message has that rank's error."""


def explain(what: str, where: str | None = None, why: str = "", remedy: str = "") -> str:
    """Lay out a refusal: what and where on the first line, then why, then what to do."""
    first = f"{what}, at {where}" if where else what
    rest: Sequence[str] = [line for line in (why, remedy) if line]
    return "\n  ".join([first, *rest])


@contextmanager
def saying_what_cannot_be_written(what: str, target: Path) -> Generator[None]:
    """Turn what the system says of a file or folder that cannot be written into an ArtifactError."""
    try:
        yield
    except OSError as why:
        raise ArtifactError(explain(f"{what} cannot be written", str(target), str(why), "Name another one.")) from why
