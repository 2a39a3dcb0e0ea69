"""Mirrors attnres_rewrite/trace_conditions.py: torch's guards as data that a call is checked by."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from attnres_rewrite.errors import CaptureError
from attnres_rewrite.trace_conditions import conditions_from, guards_of_module, holds

PATHS = ["['x']", "['flag']", "['batch']['ids']", "['rest_0']"]
TENSORS = [0, 2, 3]
SIZES = (torch.zeros(2, 6), torch.zeros(4, 3), torch.zeros(5))

GUARDS = {
    "L['x'].size()[1] <= 8": True,
    "(L['x'].size()[1] % 4) != 2": False,
    "L['x'].size()[1] == (2*L['batch']['ids'].size()[1])": True,
    "L['rest'][0].size()[0] - 1 < 4 or L['x'].size()[0]//2 == 1": True,
    "not max(L['flat_args'][3].size()[0], 3) > 4": False,
    "torch.sym_max(1, L['x'].size()[1] // 2) == 3*torch.sym_min(1, L['x'].size()[0])": True,
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


def _exported(choose: Callable[[Tensor], Tensor]) -> torch.export.ExportedProgram:
    class Choosing(nn.Module):
        def forward(self, x: Tensor, batch: dict[str, Tensor]) -> Tensor:
            return choose(x) + batch["ids"].sum()

    sizes = {0: Dim.AUTO, 1: Dim.AUTO}
    inputs = (torch.zeros(2, 6), {"ids": torch.zeros(4, 3)})
    return torch.export.export(Choosing(), inputs, dynamic_shapes=(sizes, {"ids": sizes}))


def test_the_guards_of_a_programs_module_are_read() -> None:
    module = _exported(lambda x: x if x.shape[1] <= 8 and x.shape[1] % 4 == 2 else -x).module()
    conditions = conditions_from(guards_of_module(module._guards_fn), PATHS, TENSORS)
    for sizes, right in (((2, 6), True), ((2, 4), False), ((2, 10), False)):
        assert all(holds(tree, (torch.zeros(sizes), *SIZES[1:])) for _, tree in conditions) is right


def test_a_programs_module_without_guards_has_none() -> None:
    assert guards_of_module(_exported(lambda x: x).module()._guards_fn) == []


def test_guards_that_are_written_in_another_way_are_refused() -> None:
    with pytest.raises(CaptureError, match="guards of torch.export that cannot be read"):
        guards_of_module(nn.Identity())
