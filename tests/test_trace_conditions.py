"""Mirrors attnres_rewrite/trace_conditions.py: torch's guards as data that a call is checked by."""

import pytest
import torch

from attnres_rewrite.errors import CaptureError
from attnres_rewrite.trace_conditions import conditions_from, holds

PATHS = ["['x']", "['flag']", "['batch']['ids']", "['rest_0']"]
TENSORS = [0, 2, 3]
SIZES = (torch.zeros(2, 6), torch.zeros(4, 3), torch.zeros(5))

GUARDS = {
    "L['x'].size()[1] <= 8": True,
    "(L['x'].size()[1] % 4) != 2": False,
    "L['x'].size()[1] == (2*L['batch']['ids'].size()[1])": True,
    "L['rest'][0].size()[0] - 1 < 4 or L['x'].size()[0]//2 == 1": True,
    "not max(L['flat_args'][3].size()[0], 3) > 4": False,
    "L['kwargs']['x'].size()[0]**2 == 4 and -L['x'].size()[0] > 0": False,
}


@pytest.mark.parametrize("guard", GUARDS)
def test_a_guard_holds_as_torch_means_it(guard: str) -> None:
    ((text, tree),) = conditions_from([guard], PATHS, TENSORS)
    assert holds(tree, SIZES) is GUARDS[guard]
    assert "L[" not in text


def test_a_guard_on_strides_is_left_out() -> None:
    assert conditions_from(["L['x'].stride()[0] != L['x'].size()[1]"], PATHS, TENSORS) == ()
    assert conditions_from(["L['x']._base.size()[1] >= L['x'].size()[1]"], PATHS, TENSORS) == ()


@pytest.mark.parametrize("guard", ["L['flag'] < 3", "L['unknown'].size()[0] < 3", "math.floor(3) == 3"])
def test_a_guard_on_anything_else_is_refused(guard: str) -> None:
    with pytest.raises(CaptureError, match="cannot be checked at each call"):
        conditions_from([guard], PATHS, TENSORS)
