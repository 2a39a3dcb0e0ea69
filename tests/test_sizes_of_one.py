"""Mirrors attnres_rewrite/sizes_of_one.py: models that do something else at batch 1 or length 1."""

import pytest
import torch
from torch import Tensor, nn

import attnres_rewrite as ar
from attnres_rewrite.errors import CaptureError
from tests.networks import VOCAB, WIDTH, Gpt


class Choosing(Gpt):
    """A GPT that asks for a size of one: at `where`, it `choose`s."""

    def __init__(self, choose: str, dim: int = 1) -> None:
        super().__init__(depth=1)
        self.choose = choose
        self.dim = dim

    def forward(self, ids: Tensor) -> Tensor:
        if ids.shape[self.dim] == 1:
            if self.choose == "raise":
                raise ValueError("one is too few")
            if self.choose == "other value":
                return super().forward(ids) * 2
            if self.choose == "other shape":
                return super().forward(ids)[0]
        return super().forward(ids)


def ids(*shape: int) -> Tensor:
    return torch.randint(0, 10, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("choose", ["other value", "other shape", "raise"])
@pytest.mark.parametrize("dim", [0, 1])
def test_a_size_of_one_that_the_model_treats_differently_is_refused(choose: str, dim: int) -> None:
    model = Choosing(choose, dim).eval()
    new = ar.rewrite(model, (ids(2, 6),))
    assert f"ids of size 1 in dimension {dim} is refused" in "".join(new.report.capture.notes)
    one = ids(1, 6) if dim == 0 else ids(2, 1)
    for mode in (True, False):
        with pytest.raises(ValueError, match=rf"captured where ids.size\(\)\[{dim}\] >= 2"):
            new.train(mode)(one)
    new(ids(3, 1) if dim == 0 else ids(1, 3))


def test_a_size_of_one_that_is_like_any_other_is_taken() -> None:
    model = Choosing("nothing").eval()
    new = ar.rewrite(model, (ids(2, 6),))
    assert not new.report.capture.notes
    assert torch.allclose(new(ids(1, 1)), model(ids(1, 1)), atol=1e-6)


def test_the_refusal_is_saved_with_the_rewrite(tmp_path) -> None:
    ar.save(ar.rewrite(Choosing("other value").eval(), (ids(2, 6),)), tmp_path / "saved")
    with pytest.raises(ValueError, match="captured where"):
        ar.load(tmp_path / "saved")(ids(2, 1))


def test_examples_of_one_are_not_captured_at_two() -> None:
    model = Choosing("other value", 0).eval()
    with pytest.raises(CaptureError, match="computes something else at size 1 of ids, dimension 0"):
        ar.rewrite(model, (ids(1, 6),))
    new = ar.rewrite(model, (ids(1, 6),), dynamic_shapes={})
    assert torch.allclose(new(ids(1, 6)), model(ids(1, 6)), atol=1e-6)


def test_the_model_is_left_as_it_was() -> None:
    class Counting(Gpt):
        def __init__(self) -> None:
            super().__init__(depth=1)
            self.norm_of_batch = nn.BatchNorm1d(VOCAB)
            self.last = torch.zeros(1)

        def forward(self, ids: Tensor) -> Tensor:
            out = super().forward(ids)
            self.last = self.last + 1
            return self.norm_of_batch(out.transpose(1, 2)).transpose(1, 2)

    model = Counting().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    ar.rewrite(model, (ids(2, 6),), verify=False)
    assert model.training
    assert model.last == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_one_tensor_given_twice_is_made_small_for_each_input() -> None:
    class Two(Gpt):
        def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
            out = super().forward(ids)
            return out.sum() if labels.shape[0] == 1 else out

    both = ids(2, 6)
    new = ar.rewrite(Two(depth=1).eval(), (both, both))
    assert "of size 1 in dimension 0 is refused" in "".join(new.report.capture.notes)


class Cached(Gpt):
    """Keeps a table that it made of a parameter in a dict while it is in eval mode, as LeViT does."""

    def __init__(self) -> None:
        super().__init__(depth=2)
        self.table = torch.nn.Parameter(torch.randn(WIDTH))
        self.cache: dict[str, torch.Tensor] = {}

    def forward(self, ids):
        if self.training:
            return super().forward(ids) * self.table.sum()
        if "table" not in self.cache:
            self.cache["table"] = self.table.sum()
        return super().forward(ids) * self.cache["table"]

    def train(self, mode: bool = True) -> "Cached":
        if mode:
            self.cache = {}
        return super().train(mode)


# Once wrong: the table was made without gradients, and kept; the model's own gradients were lost
def test_what_a_model_keeps_in_a_dict_is_left_as_it_was():
    model = Cached().eval()
    new = ar.rewrite(model, (torch.zeros(2, 5, dtype=torch.long),))
    assert not model.cache
    assert new.report.verify.passed
    model(torch.zeros(2, 5, dtype=torch.long)).sum().backward()
    assert model.table.grad is not None


# Once wrong: a table kept from an evaluation became a constant of the graph, in the place of the parameter
def test_a_table_kept_from_an_evaluation_is_made_again():
    model = Cached().eval()
    model.layers[0].train()
    ids = torch.zeros(2, 5, dtype=torch.long)
    with torch.no_grad():
        model(ids)
    new = ar.rewrite(model, (ids,))
    assert new.report.verify.passed
    assert model.layers[0].training
    assert not model.layers[1].training
    new(ids).sum().backward()
    assert new.get_parameter("table").grad is not None
