"""Pipelines of models that were built on the meta device: no process ever has the whole model."""

import functools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

import attnres_rewrite as ar
from tests.networks import VOCAB
from tests.processes import run_on_ranks

MICROBATCHES = 4
batch = torch.randint(0, VOCAB, (2 * MICROBATCHES, 6), generator=torch.Generator().manual_seed(0))


def on_meta() -> tuple[nn.Module, ar.RewrittenModule]:
    """Return a Llama: it makes masks and positions, some under no_grad, and has a table that is in no state dict."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=VOCAB, num_hidden_layers=4, tie_word_embeddings=True, **sizes)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
        ids = torch.zeros(2, 6, dtype=torch.long)
    config = ar.AttnResConfig(num_blocks=2)
    return model, ar.rewrite(model, (ids,), {"use_cache": False}, config, dynamic_shapes={}, verify=False)


def loss_of(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def built(new: ar.RewrittenModule, num_ranks: int = 1, num_virtual: int = 2, **options) -> ar.Pipeline:
    plan = ar.partition(new, num_ranks, num_virtual)
    schedule = "Interleaved1F1B" if num_virtual > 1 else "1F1B"
    return ar.build_pipeline(plan, schedule, n_microbatches=MICROBATCHES, device="cpu", loss_fn=loss_of, **options)


def fresh(model: nn.Module) -> None:
    model.initialize_weights()


def reference() -> ar.RewrittenModule:
    """Return the whole model in this process, with the values that a pipeline of it begins with."""
    model, new = on_meta()
    new.to_empty(device="cpu")
    ar.initialize(new, model, fresh)
    return new


def check(pipeline: ar.Pipeline, is_first: bool) -> None:
    whole = reference()
    for name, value in pipeline.state_dict().items():
        found = value.full_tensor() if isinstance(value, DTensor) else value
        assert torch.equal(found, whole.state_dict()[name]), name
    losses: list[torch.Tensor] = []
    pipeline.step(*((batch,) if is_first else ()), target=batch, losses=losses)
    pipeline.reduce_tied_gradients()
    loss = sum(loss_of(whole(ids).logits, ids) for ids in batch.chunk(MICROBATCHES)) / MICROBATCHES
    loss.backward()
    if losses:
        torch.testing.assert_close(sum(losses) / MICROBATCHES, loss)
    for name, parameter in pipeline.named_parameters():
        found = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        torch.testing.assert_close(found, whole.get_parameter(name).grad, msg=name)


def run_stages() -> None:
    model, new = on_meta()
    pipeline = built(new, 2)
    pipeline.initialize(model, fresh)
    check(pipeline, dist.get_rank() == 0)


def run_shards() -> None:
    model, new = on_meta()
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("pp", "dp"))
    wrap = functools.partial(fully_shard, mesh=mesh["dp"])
    pipeline = built(new, num_virtual=1, group=mesh["pp"].get_group(), wrap=wrap)
    assert all(isinstance(value, DTensor) for value in pipeline.parameters())
    pipeline.initialize(model, fresh)
    check(pipeline, is_first=True)


@pytest.mark.parametrize("body", [run_stages, run_shards])
def test_every_partition_starts_as_the_whole_model(body):
    run_on_ranks(2, body)


@pytest.fixture
def _one_process():
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_one_process")
def test_without_values_nothing_runs():
    model, new = on_meta()
    pipeline = built(new)
    for run in (pipeline.step, pipeline.evaluate):
        with pytest.raises(RuntimeError, match=r"has no values yet.* pipeline.initialize\(model, init\)"):
            run(batch, target=batch)
    # the tables of positions are in no state dict
    pipeline.load_state_dict(reference().state_dict())
    with pytest.raises(RuntimeError, match=r"inv_freq, one of 2, has no values yet"):
        pipeline.step(batch, target=batch)
    with pytest.raises(ValueError, match="init left"):
        pipeline.initialize(model, lambda model: None)
    pipeline.initialize(model, fresh)
    pipeline.step(batch, target=batch)


@pytest.mark.usefixtures("_one_process")
def test_values_may_come_from_anywhere():
    _, new = on_meta()
    pipeline = built(new)
    with torch.no_grad():
        for _, value in pipeline.named_tensors():
            value.fill_(0.5)
    losses: list[torch.Tensor] = []
    pipeline.step(batch, target=batch, losses=losses)
    assert all(loss.isfinite() for loss in losses)
