"""What `attnres-rewrite report` does around the page itself: the file it goes to, and the model it is about."""

import tempfile
from pathlib import Path

import attnres_rewrite as ar
from attnres_rewrite.cli.load import Loaded
from attnres_rewrite.cli.render import Stage
from attnres_rewrite.errors import ArtifactError, explain


def check_target(target: Path, force: bool) -> None:
    """Refuse a file that could not be written, before the work.

    Raises:
        ArtifactError: There is a file already and no `force`, or the folder takes no new file.
        ValueError: There is no such folder.
    """
    if not target.parent.is_dir():
        raise ValueError(f"-o {target}: there is no folder {target.parent}")
    if target.is_dir():
        raise ArtifactError(explain(f"{target} is a folder", remedy="-o names the file to write."))
    if target.exists() and not force:
        raise ArtifactError(explain(f"{target} exists", remedy="--force replaces it, -o names another file."))
    try:
        # permissions do not tell: a root user may write, and a read-only file system not
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as why:
        raise ArtifactError(explain(f"{target} cannot be written", why=str(why), remedy="-o names another.")) from why


def rewritten(found: Loaded, config: ar.AttnResConfig, *, proves: bool, progress: Stage) -> ar.RewrittenModule:
    """Return the rewrite that the page is about: the one that was loaded, or one made now."""
    if isinstance(found.model, ar.RewrittenModule):
        return found.model
    # a program of meta tensors never runs, so fixed shapes will do, in half the time
    is_meta = any(parameter.is_meta for parameter in found.model.parameters())
    return ar.rewrite(
        found.model,
        found.args,
        found.kwargs,
        config,
        dynamic_shapes={} if is_meta else None,
        verify=proves,
        progress=progress,
    )
