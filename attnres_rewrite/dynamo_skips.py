"""Code that Dynamo skips: an error that it met while it traced makes it leave that code uncompiled, from then on.

What runs such code is plain Python under a compiled call. `trace_again` takes the skip back, for calls that are right.
"""

from collections.abc import Callable
from types import CodeType
from typing import Any

import torch._C._dynamo.eval_frame as _torch_frames
from torch import nn

# torch's stubs lack most of it
_frames: Any = _torch_frames

# What Dynamo looks at functions with as they are called: a callable inside a compiled call. The builtin itself, as a
# function around it would be looked at, too.
active_callback: Callable[[], Any] = _frames.get_eval_frame_callback


def trace_again(code: CodeType) -> None:
    """Have Dynamo trace `code` and the calls of modules once more; what it compiled of them stays."""
    default = _frames._FrameExecStrategy(_frames._FrameAction.DEFAULT, _frames._FrameAction.DEFAULT)
    for skipped in (code, nn.Module._call_impl.__code__):
        _frames.set_code_exec_strategy(skipped, default)
