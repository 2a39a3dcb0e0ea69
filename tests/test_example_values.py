"""Mirrors attnres_rewrite/example_values.py: a rewrite that was saved is diagnosed as it was before."""

import pytest
import torch
from torch import Tensor, nn

import attnres_rewrite as ar
from attnres_rewrite.example_values import program_with_values
from attnres_rewrite.fxgraph import shape_of, tensor_of
from tests.networks import Gpt, ids


class Positions(Gpt):
    """Adds what has no batch: at a batch of one it has the shape of the stream."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.layers[0](self.embed(ids))
        x = x + self.embed.weight[None, : ids.shape[1]]
        return self.head(self.norm(self.layers[1](x)))


class Vectors(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.stem, self.layer, self.norm = nn.Linear(4, 4), layer, nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.layer(x)
        return self.norm(x + self.layer(x))


@pytest.mark.parametrize("num_rows", [1, 2])
def test_a_saved_rewrite_gives_the_same_figures(tmp_path, num_rows):
    model = Positions(2, dropout=0.1).eval()
    new = ar.rewrite(model, (ids(num_rows),), config=ar.AttnResConfig(num_blocks=2), verify=False)
    torch.nn.init.normal_(new.get_parameter("layers.1.attn_res.1.query"))
    again = ar.load(ar.save(new, tmp_path / "saved"))
    assert tensor_of(again.programs[False].plans[0].stream.root) is None
    batches = [ids(2, 5), ids(3, 5)]
    found, wanted = ar.diagnose(again, batches), ar.diagnose(new, batches)
    assert found == wanted
    assert tensor_of(again.programs[False].plans[0].stream.root) is None
    weights = ar.depth_weights(new, ids())
    for name, value in ar.depth_weights(again, ids()).items():
        assert torch.equal(value, weights[name])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_saved_rewrite_in_another_dtype_takes_its_batches(tmp_path, dtype):
    layer = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))
    new = ar.rewrite(Vectors(layer).eval(), (torch.ones(2, 4),), verify=False)
    again = ar.load(ar.save(new, tmp_path / "saved")).to(dtype)
    batch, loss = torch.eye(4, dtype=dtype), lambda outputs, batch: outputs.square().mean()
    assert ar.diagnose(again, [batch], loss_fn=loss).streams[0].num_tokens == 4
    assert ar.depth_weights(again, batch)


def test_values_have_shapes_and_no_memory():
    new = ar.rewrite(Gpt(1).eval(), (ids(),), config=ar.AttnResConfig(num_blocks=1), verify=False)
    assert program_with_values(new) is new.programs[False]
    kept = {node.name: shape_of(node) for node in new.programs[False].original.nodes if tensor_of(node) is not None}
    for node in new.programs[False].original.nodes:
        node.meta.pop("val", None)
    found = program_with_values(new)
    assert {node.name: shape_of(node) for node in found.original.nodes if node.name in kept} == kept
    state = tensor_of(found.plans[0].stream.states[1])
    assert state.untyped_storage().nbytes() == state.element_size()
