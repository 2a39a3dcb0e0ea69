"""Let torchvision be imported beside a torch that it was not built for.

Package indexes serve a torchvision for CUDA builds of torch. Beside a CPU build its library does not
load, and `import torchvision` stops at "operator torchvision::nms does not exist"; timm and much of
transformers stop with it. The operators are never called here: their schemas are enough.
"""

import importlib.util
import sys
from pathlib import Path

import torch

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_library: torch.library.Library | None = None


def define_missing_ops() -> None:
    """Declare the operators that torchvision expects, unless its own library loads.

    Call it before anything imports torchvision. Without torchvision it does nothing.
    """
    global _library
    if _library is not None or "torchvision" in sys.modules:
        return
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or _loads(Path(spec.origin).parent):
        return
    # the schemas live as long as this object
    _library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        _library.define(operator + _SCHEMA)


def _loads(package: Path) -> bool:
    for library in sorted(package.glob("_C*.so")):
        try:
            torch.ops.load_library(str(library))
        except OSError:
            continue
        return True
    return False
