"""Mirrors attnres_rewrite/diagnose.py: every figure equals one computed by hand with the independent interpreter.

The second computation keeps all tokens of all batches, and shares no code with diagnose, taps or insert_reads.
"""

import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import attnres_rewrite as ar
from attnres_rewrite.inputs import flat_inputs
from attnres_rewrite.lifted import LiftedInterpreter, LiftedState
from attnres_rewrite.witness import DepthInterpreter
from tests.networks import VOCAB, WIDTH, Gpt, Layer, gpt, gpt_of, ids

LIMIT = 1e-10


@dataclass
class Seen:
    """What one run of one network showed, by (stream, update or state)."""

    updates: dict = field(default_factory=dict)
    sums: dict = field(default_factory=dict)
    mixes: dict = field(default_factory=dict)
    weights: dict = field(default_factory=dict)
    gradients: dict = field(default_factory=dict)
    loss: float = 0.0


class Original(LiftedInterpreter):
    """Run the original graph and keep every update and state."""

    def __init__(self, graph, state, plans) -> None:
        super().__init__(graph, state)
        self.seen, self.plans = Seen(), plans
        self.adds = {u.add: (s, k, u) for s, p in enumerate(plans) for k, u in enumerate(p.stream.updates, start=1)}
        self.roots = {plan.stream.root: (index, 0) for index, plan in enumerate(plans)}

    def run_node(self, n) -> Any:
        value = self.at_add(n, *self.adds[n]) if n in self.adds else super().run_node(n)
        if n in self.roots:
            self.seen.mixes[self.roots[n]] = value
        return value

    def at_add(self, node, stream, number, update) -> Any:
        """Run an add with an update of its own, whose gradient comes from this add alone."""
        kept = self.env[update.branch]
        like = self.env[update.stream]
        own = kept.expand_as(like).clone()
        own = own if own.requires_grad else own.requires_grad_()
        own.retain_grad()
        self.env[update.branch] = self.seen.updates[stream, number] = own
        value = super().run_node(node)
        self.env[update.branch] = kept
        self.note(stream, number, value)
        return value

    def note(self, stream, number, value) -> None:
        self.seen.sums[stream, number] = self.seen.mixes[stream, number] = value


class Rewritten(Original, DepthInterpreter):
    """Evaluate the rewrite over the original graph, as DepthInterpreter does, and keep what it mixes."""

    def __init__(self, graph, state, plans, config) -> None:
        DepthInterpreter.__init__(self, graph, state, plans, config)
        self.seen, self.plans = Seen(), plans
        self.adds = {u.add: (s, k, u) for s, p in enumerate(plans) for k, u in enumerate(p.stream.updates, start=1)}
        self.roots = {plan.stream.root: (index, 0) for index, plan in enumerate(plans)}

    def note(self, stream, number, value) -> None:
        plan = self.plans[stream]
        sources = self._sources[stream, plan.stream.updates[number - 1].add]
        self.seen.sums[stream, number] = sources[-1]
        for read in plan.reads:
            if read.state == number:
                self.seen.mixes[stream, number] = value
                self.seen.weights[stream, number] = self.weigh(sources, read, plan.stream.axes[number])

    def weigh(self, sources, read, axis) -> Tensor:
        gain = self.state.parameters.get(f"{read.name}.key_norm", torch.ones(()))
        query = self.state.parameters[read.query_name]
        config, logits = self.config, []
        for source in sources:
            token = source.detach().movedim(axis, -1)
            token = token if config.key_rank is None else token[..., token.shape[-1] - config.key_rank :]
            key = token / torch.sqrt(token.square().mean(-1, keepdim=True) + config.eps) * gain
            heads = (key * query).unflatten(-1, (config.num_heads, -1)).sum(-1)
            logits.append(heads.squeeze(-1) if config.num_heads == 1 else heads)
        logits[-1] = logits[-1] + config.recency_bias
        return torch.stack(logits, -1).softmax(-1)


def by_hand(new, batches, loss_of, twin: nn.Module | None = None) -> tuple[list[Seen], list[Seen]]:
    """Run every batch through both networks, and keep everything."""
    program = new.programs[new.training]
    found: tuple[list[Seen], list[Seen]] = ([], [])
    for args, kwargs in batches:
        for runs, side in zip((0, 1), found, strict=True):
            state = LiftedState(new if not runs or twin is None else twin, (program.original,), False)
            if runs:
                runner = Original(program.original, state, program.plans)
            else:
                state = LiftedState(new, (program.original, program.graph), False)
                runner = Rewritten(program.original, state, program.plans, new.config)
            leaves = flat_inputs(program.original, args, kwargs)
            outputs, _ = runner.run_lifted(leaves)
            loss = loss_of(pytree.tree_unflatten(outputs, program.original._codegen.pytree_info.out_spec), leaves)
            loss.backward()
            seen = runner.seen
            seen.gradients = {key: value.grad for key, value in seen.updates.items()}
            seen.loss = loss.item()
            side.append(seen)
    return found


def rms(tensors: list[Tensor]) -> float:
    return torch.cat([tensor.detach().flatten() for tensor in tensors]).square().mean().sqrt().item()


def norm(gradients: list[Tensor | None], width: int, like: list[Tensor]) -> float:
    given = [torch.zeros_like(at) if grad is None else grad for grad, at in zip(gradients, like, strict=True)]
    return rms(given) * math.sqrt(width)


def assert_near(found: float, wanted: float) -> None:
    assert abs(found - wanted) <= LIMIT * max(1.0, abs(wanted)), (found, wanted)


def check(diagnosis: ar.Diagnosis, new, mine: list[Seen], original: list[Seen]) -> None:
    """Compare every figure of a diagnosis with those of the runs."""
    assert_near(diagnosis.loss, sum(seen.loss for seen in mine) / len(mine))
    assert_near(diagnosis.baseline_loss, sum(seen.loss for seen in original) / len(original))
    plans = new.programs[new.training].plans
    assert len(diagnosis.streams) == len(plans)
    for index, (stream, plan) in enumerate(zip(diagnosis.streams, plans, strict=True)):
        assert [update.index for update in stream.updates] == list(range(1, len(plan.stream.updates) + 1))
        assert [read.state for read in stream.reads] == [read.state for read in plan.reads]
        for update in stream.updates:
            check_update(update, index, stream.width, mine, original)
        for read in stream.reads:
            check_read(read, index, mine)


def check_update(update, index, width, mine, original) -> None:
    at = index, update.index
    for found, side in ((update, mine), (_Baseline(update), original)):
        assert_near(found.output_rms, rms([seen.updates[at] for seen in side]))
        assert_near(found.sum_rms, rms([seen.sums[at] for seen in side]))
        like = [seen.updates[at] for seen in side]
        assert_near(found.gradient_norm, norm([seen.gradients[at] for seen in side], width, like))
        if update.reads is not None:
            assert_near(found.input_rms, rms([seen.mixes[index, update.reads] for seen in side]))


class _Baseline:
    def __init__(self, update) -> None:
        self.update = update

    def __getattr__(self, name: str) -> float:
        return getattr(self.update, f"baseline_{name}")


def check_read(read, index, mine) -> None:
    tokens = torch.cat([seen.weights[index, read.state].flatten(0, -2) for seen in mine])
    entropy = -(tokens * tokens.log()).sum(-1)
    for position in range(tokens.shape[-1]):
        assert_near(read.weights[position], tokens[:, position].mean().item())
        assert_near(read.spreads[position], tokens[:, position].std(correction=0).item())
    assert len(read.weights) == len(read.sources) == tokens.shape[-1]
    assert_near(read.entropy, entropy.mean().item())
    assert_near(read.effective_sources, entropy.exp().mean().item())
    assert_near(read.mix_rms, rms([seen.mixes[index, read.state] for seen in mine]))


def rewritten(model: nn.Module, *batch: Any, seed: int = 0, **config: Any) -> ar.RewrittenModule:
    """Rewrite a float64 model, with queries that make a difference."""
    args = tuple(value for value in batch if not isinstance(value, dict))
    kwargs = next((value for value in batch if isinstance(value, dict)), {})
    new = ar.rewrite(model.double(), args, kwargs, ar.AttnResConfig(**config), verify=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in new.named_parameters():
            if "attn_res" in name:
                parameter += 0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return new


def next_token(outputs: Tensor, tokens: Tensor) -> Tensor:
    """Return the mean of -log p of the next token, written out."""
    chosen = outputs.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])
    return -chosen.mean()


def own_loss(outputs: Any, leaves: list[Any]) -> Tensor:
    return outputs.loss


def squared(outputs: Any, leaves: list[Any]) -> Tensor:
    """A loss of any outputs that are floating."""
    tensors = [value for value in pytree.tree_leaves(outputs) if isinstance(value, Tensor) and value.requires_grad]
    return sum((value - 0.1).square().mean() for value in tensors)


def parallel(layer: Layer, x: Tensor) -> Tensor:
    return x + layer.f(layer.n1(x)) + layer.g(layer.n2(x))


def scaled(layer: Layer, x: Tensor) -> Tensor:
    x = 0.9 * x + layer.f(layer.n1(x))
    return x + layer.g(layer.n2(x)) * layer.gain


class Positions(Gpt):
    """Adds what does not read the stream, and has fewer dimensions than it."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for number, layer in enumerate(self.layers):
            x = layer(x)
            if number == 0:
                x = x + self.embed.weight[: ids.shape[1]]
        return self.head(self.norm(x))


def _positions() -> Gpt:
    torch.manual_seed(0)
    return Positions(3).eval()


def _own_gpt() -> Gpt:
    return gpt()


NETWORKS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "gpt": (_own_gpt, {"num_blocks": 3}),
    "mean": (_own_gpt, {"block_size": 4, "output": "mean"}),
    "full, two-phase": (_own_gpt, {"num_blocks": "full", "schedule": "two_phase"}),
    "without gains": (_own_gpt, {"num_blocks": 2, "key_norm": False}),
    "parallel": (lambda: gpt_of(parallel, 2), {"num_blocks": 2}),
    "scaled": (lambda: gpt_of(scaled, 2), {"num_blocks": 3}),
    "injected": (_positions, {"num_blocks": 3}),
    "heads": (_own_gpt, {"num_blocks": 3, "num_heads": 4}),
    "key rank": (_own_gpt, {"num_blocks": 3, "key_rank": 5}),
    "bias": (_own_gpt, {"num_blocks": 3, "recency_bias": 0.7}),
    "gate": (_own_gpt, {"num_blocks": 3, "gate": True}),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_figures_equal_those_of_the_independent_interpreter(name):
    build, config = NETWORKS[name]
    new = rewritten(build(), ids(), **config)
    batches = [ids(2, 5), ids(3, 7), ids(1, 4)]
    mine, original = by_hand(new, [((batch,), {}) for batch in batches], lambda out, leaves: next_token(out, leaves[0]))
    check(ar.diagnose(new, batches), new, mine, original)


def test_figures_of_a_twin():
    new, twin = rewritten(gpt(), ids(), num_blocks=3), gpt().double()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    mine, original = by_hand(new, [((ids(),), {})], lambda out, leaves: next_token(out, leaves[0]), twin)
    for baseline in (twin, twin.state_dict()):
        check(ar.diagnose(new, [ids()], baseline=baseline), new, mine, original)


def lift_casts(new: ar.RewrittenModule) -> ar.RewrittenModule:
    """Take out the casts to float32 that a model writes into its norms: they would round away what is compared."""
    for program in new.programs.values():
        for node in list(program.original.nodes):
            if "_assert_tensor_metadata" in str(node.target):
                program.original.erase_node(node)
                continue
            wide = pytree.tree_map(
                lambda leaf: torch.float64 if leaf is torch.float32 else leaf, (node.args, node.kwargs)
            )
            node.args, node.kwargs = wide
    return new


def _llama() -> tuple[nn.Module, dict[str, Any]]:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=VOCAB, **sizes, use_cache=False))
    return model.eval(), {"input_ids": ids(), "labels": ids()}


def _t5() -> tuple[nn.Module, dict[str, Any]]:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "d_model": 16,
        "d_ff": 32,
        "d_kv": 8,
        "num_layers": 2,
        "num_heads": 2,
        "use_cache": False,
        "decoder_start_token_id": 0,
    }
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=VOCAB, **sizes))
    return model.eval(), {"input_ids": ids(2, 6), "labels": ids(2, 4)}


def _vit() -> tuple[nn.Module, dict[str, Any]]:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.ViTForImageClassification(transformers.ViTConfig(image_size=8, patch_size=4, **sizes))
    return model.eval(), {"pixel_values": torch.randn(2, 3, 8, 8, dtype=torch.float64)}


HUGGINGFACE = {
    "llama": (_llama, own_loss, None, [["attention", "mlp"] * 2]),
    "t5": (_t5, own_loss, None, [["attention", "mlp"] * 2, ["attention", "attention", "mlp"] * 2]),
    "vit": (_vit, squared, lambda outputs, batch: squared(outputs, []), [["attention", "mlp"] * 2]),
}


@pytest.mark.parametrize(
    "name", [pytest.param("llama", marks=pytest.mark.slow), pytest.param("t5", marks=pytest.mark.slow), "vit"]
)
def test_figures_of_a_huggingface_model(name):
    torch.manual_seed(0)
    build, by, loss_fn, kinds = HUGGINGFACE[name]
    model, batch = build()
    new = lift_casts(rewritten(model, batch, num_blocks=2))
    mine, original = by_hand(new, [((), batch)] * 2, by)
    diagnosis = ar.diagnose(new, [batch] * 2, loss_fn=loss_fn)
    assert diagnosis.loss_kind == ("default" if loss_fn is None else "given")
    check(diagnosis, new, mine, original)
    assert [[update.kind for update in stream.updates] for stream in diagnosis.streams] == kinds


@pytest.fixture(scope="module")
def new() -> ar.RewrittenModule:
    return ar.rewrite(gpt(), (ids(),), config=ar.AttnResConfig(num_blocks=2), verify=False)


def test_at_zero_queries_the_original_is_itself(new):
    found = ar.diagnose(new, [ids()])
    assert (found.num_batches, found.num_nonfinite, found.mode, found.baseline) == (1, 0, "eval", "own")
    assert (found.config, found.loss_kind) == (new.config, "default")
    assert found.num_tokens == ids().numel()
    assert found.loss == pytest.approx(found.baseline_loss, rel=1e-6)
    (stream,) = found.streams
    assert stream.blocks == ((1, 3), (4, 6))
    assert [read.sources for read in stream.reads] == [
        ("embedding", "partial"),
        ("embedding", "partial"),
        ("embedding", "block 1"),
        ("embedding", "block 1", "partial"),
        ("embedding", "block 1", "partial"),
        ("embedding", "block 1", "block 2"),
    ]
    for read in stream.reads:
        assert read.effective_sources == pytest.approx(len(read.sources))
    for update in stream.updates:
        assert update.output_rms == pytest.approx(update.baseline_output_rms, rel=1e-5)
        assert update.gradient_norm == pytest.approx(update.baseline_gradient_norm, rel=1e-5)


def test_without_a_baseline(new):
    found = ar.diagnose(new, [ids()], baseline=False)
    assert (found.baseline, found.baseline_loss, found.streams[0].baseline_root_rms) == ("", None, None)
    assert {update.baseline_output_rms for update in found.streams[0].updates} == {None}


def test_the_network_is_left_as_it_was():
    class Counting(Gpt):
        def __init__(self) -> None:
            super().__init__(1, dropout=0.1)
            self.batch_norm = nn.BatchNorm1d(WIDTH)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.layers[0](self.embed(ids))
            return self.head(self.norm(x) + self.batch_norm(self.embed(ids).flatten(0, 1)).view(x.shape))

    new = ar.rewrite(Counting(), (ids(),), config=ar.AttnResConfig(num_blocks=1), verify=False).train()
    new(ids()).sum().backward()
    kept = {name: value.clone() for name, value in new.state_dict().items()}
    gradients = {name: value.grad.clone() for name, value in new.named_parameters()}
    found = ar.diagnose(new, [ids()] * 2)
    assert found.mode == "train"
    assert new.training
    for name, value in new.state_dict().items():
        assert torch.equal(value, kept[name]), name
    for name, value in new.named_parameters():
        assert value.requires_grad
        assert torch.equal(value.grad, gradients[name]), name


def test_frozen_parameters_have_gradients_of_their_updates(new):
    wanted = ar.diagnose(new, [ids()])
    new.requires_grad_(False)
    frozen = ar.diagnose(new, [ids()])
    new.requires_grad_(True)
    assert frozen == wanted
    with torch.no_grad():
        assert ar.diagnose(new, [ids()]) == wanted


def test_batches_that_are_not_finite_are_counted_and_left_out(new):
    done = []
    factors = iter([1.0, float("nan"), 1.0, float("inf")])

    def loss_fn(outputs: Tensor, batch: Tensor) -> Tensor:
        return outputs.square().mean() * next(factors)

    batches = [ids(1, 4), ids(1, 5), ids(1, 6), ids(1, 7)]
    found = ar.diagnose(new, batches, loss_fn=loss_fn, baseline=False, progress=lambda *count: done.append(count))
    assert done == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert (found.num_batches, found.num_nonfinite, found.nonfinite_batches) == (4, 2, (1, 3))
    wanted = ar.diagnose(
        new, [batches[0], batches[2]], loss_fn=lambda outputs, batch: outputs.square().mean(), baseline=False
    )
    assert (found.loss, found.streams) == (wanted.loss, wanted.streams)
    kept = ar.diagnose(new, [ids()], loss_fn=lambda outputs, batch: outputs.sum() * float("nan"))
    assert (kept.loss, kept.streams, kept.num_nonfinite) == (None, (), 1)


def test_one_batch_is_held_at_a_time(new):
    alive: list[weakref.ref] = []

    class Batch(dict):
        """A mapping that can be weakly referenced."""

    def batches() -> Iterator[Batch]:
        for length in (4, 5, 6):
            assert all(reference() is None for reference in alive)
            batch = Batch(ids=ids(1, length))
            alive.append(weakref.ref(batch))
            yield batch
            del batch

    found = ar.diagnose(new, batches(), baseline=False)
    assert (found.num_batches, found.num_tokens) == (3, 15)


def test_no_more_batches_are_taken_than_asked_for(new):
    source, done = iter([ids(1, 4), ids(1, 5), ids(1, 6)]), []
    found = ar.diagnose(new, source, max_batches=2, baseline=False, progress=lambda *count: done.append(count))
    assert found.num_batches == 2
    assert done == [(1, 2), (2, 2)]
    assert next(source).shape == (1, 6)
    assert ar.diagnose(new, [ids()], max_batches=9, baseline=False).num_batches == 1


def test_a_loader_that_does_not_know_its_length(new):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Iterator[Tensor]:
            yield from (ids(1, 4), ids(1, 4))

    done = []
    loader = torch.utils.data.DataLoader(Stream(), batch_size=None)
    ar.diagnose(new, loader, baseline=False, progress=lambda *count: done.append(count))
    assert done == [(1, None), (2, None)]


def test_inputs_that_are_the_stream_themselves():
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer(parallel) for _ in range(2))
            self.norm = nn.LayerNorm(WIDTH)

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return self.norm(x) * scale

    torch.manual_seed(0)
    batch = torch.randn(2, 5, WIDTH, dtype=torch.float64), torch.rand(2, 5, 1, dtype=torch.float64)
    new = rewritten(Plain().eval(), *batch, num_blocks=2)
    mine, original = by_hand(new, [(batch, {})], squared)
    found = ar.diagnose(new, [batch], loss_fn=lambda outputs, batch: squared(outputs, []))
    check(found, new, mine, original)
    assert found.streams[0].root_rms == pytest.approx(rms([batch[0]]))


def test_depth_weights_are_those_of_every_token():
    new = rewritten(gpt(), ids(), num_blocks=2)
    weights = ar.depth_weights(new, ids(3, 4))
    (stream,) = ar.diagnose(new, [ids(3, 4)], baseline=False).streams
    assert list(weights) == [read.name for read in stream.reads]
    for read in stream.reads:
        assert weights[read.name].shape == (3, 4, len(read.sources))
        assert not weights[read.name].requires_grad
        torch.testing.assert_close(weights[read.name].sum(-1), torch.ones(3, 4, dtype=torch.float64))
        torch.testing.assert_close(weights[read.name].flatten(0, 1).mean(0).tolist(), list(read.weights))


def test_a_stream_that_starts_at_a_state_of_another():
    class Forked(Gpt):
        def forward(self, ids: Tensor) -> Tensor:
            trunk = self.layers[0](self.embed(ids))
            return self.head(self.norm(self.layers[1](trunk))) + self.head(self.norm(self.layers[2](trunk)))

    config = ar.AttnResConfig(num_blocks="full")
    new = ar.rewrite(Forked().eval(), (ids(),), config=config, dynamic_shapes={}, verify=False)
    trunk, stack = ar.diagnose(new, [(ids(),)]).streams
    assert stack.root_rms == pytest.approx(trunk.reads[1].mix_rms)
