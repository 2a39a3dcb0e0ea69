"""Mirrors attnres_rewrite/inputs.py: a call that the program was not captured for is refused."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import attnres_rewrite as ar

WIDTH = 8


class Choosing(nn.Module):
    """Two updates, and choices by a flag, by a mask and by the length."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, flip: bool = False, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
        x = x + self.layer(self.norm(x))
        x = x + self.layer(self.norm(x))
        if flip:
            x = -x
        if mask is not None:
            x = x * mask
        return -x if x.shape[1] > 8 else x * scale


def rewritten(*args: object) -> tuple[nn.Module, ar.RewrittenModule]:
    model = Choosing().eval()
    return model, ar.rewrite(model, args, verify=False)


def test_another_constant_is_refused(tmp_path: Path) -> None:
    x = torch.randn(2, 5, WIDTH)
    model, new = rewritten(x, False, None, 1.0)
    for same in (new, ar.load(ar.save(new, tmp_path / "saved"))):
        assert torch.allclose(same(x), model(x))
        assert torch.allclose(same(x, False, scale=1.0), model(x))
        for name, value in {"flip": True, "mask": torch.rand(2, 5, 1), "scale": 2.0}.items():
            with pytest.raises(ValueError, match=f"{name} is .*captured for {name}="):
                same(x, **{name: value})


def test_a_length_at_which_the_model_chooses_otherwise_is_refused(tmp_path: Path) -> None:
    x, longer, too_long = (torch.randn(2, length, WIDTH) for length in (5, 8, 9))
    model, new = rewritten(x)
    for same in (new, ar.load(ar.save(new, tmp_path / "saved"))):
        assert torch.allclose(same(longer), model(longer))
        with pytest.raises(
            ValueError, match=r"captured where x.size\(\)\[1\] <= 8, and this call has sizes \[\[2, 9, 8\]\]"
        ):
            same(too_long)
    compiled = torch.compile(new, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(longer), model(longer))
    # torch 2.11 shows the parts of the message
    with pytest.raises(Exception, match=r"captured where .*x.size\(\)\[1\] <= 8"):
        compiled(too_long)


def test_the_module_of_a_program_keeps_its_guards() -> None:
    x, too_long = (torch.randn(2, length, WIDTH) for length in (5, 9))
    model = Choosing().eval()
    sizes = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    new = ar.rewrite(torch.export.export(model, (x,), dynamic_shapes=(sizes,)).module(), (x,), verify=False)
    assert torch.allclose(new(x), model(x))
    with pytest.raises(ValueError, match=r"captured where x.size\(\)\[1\] <= 8"):
        new(too_long)


def test_a_nan_is_a_constant_too() -> None:
    x = torch.randn(2, 5, WIDTH)
    _, new = rewritten(x, False, None, float("nan"))
    assert new(x, scale=float("nan")).isnan().all()


def test_what_is_no_tensor_is_refused_in_place_of_one() -> None:
    _, new = rewritten(torch.randn(2, 5, WIDTH))
    with pytest.raises(ValueError, match="x is None; the program was captured for a tensor"):
        new(None)
