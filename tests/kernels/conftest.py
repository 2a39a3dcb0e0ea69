"""On a machine without a GPU the tests of the kernels run each twice: in Triton's interpreter, and in C++."""

from importlib.metadata import version
from importlib.util import find_spec

import pytest
import torch
from torch.torch_version import TorchVersion

from tests.kernels.budget import DEVICE

_LACKS_INTERPRETER = (
    find_spec("triton") is not None
    and TorchVersion(version("triton")) < (3, 7)
    and TorchVersion(version("numpy")) >= (2, 5)
)
OPERATIONS = ("inter_block", "merge", "read")


@pytest.fixture(params=["triton"] if DEVICE == "cuda" else ["triton", "cpp"])
def language(request, monkeypatch):
    """The language of the kernels."""
    if request.param == "triton":
        if DEVICE == "cpu" and _LACKS_INTERPRETER:
            pytest.skip("the interpreter of Triton 3.6 does not run with numpy 2.5 or newer")
        for operation in OPERATIONS:
            monkeypatch.setattr(f"attnres_rewrite.kernels.{operation}.op.is_for_cpp", lambda tensor: False)
    return request.param


def pytest_collection_modifyitems(items):
    """Leave out bfloat16 where Triton's interpreter would truncate it; a GPU rounds, and so does C++."""
    if DEVICE == "cpu":
        left_out = {"language": "triton", "dtype": torch.bfloat16}.items()
        items[:] = [
            item for item in items if not (hasattr(item, "callspec") and left_out <= item.callspec.params.items())
        ]
