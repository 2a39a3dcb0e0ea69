"""torch.compile(backend="attnres"): what rewrite() computes, in every way a model is run; caches."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils.checkpoint import checkpoint

import attnres_rewrite as ar
from attnres_rewrite import functional
from tests.attached import CONFIG, QUICK, assert_same, attached, ids, small
from tests.joint import mm_dit
from tests.networks import Gpt

PARTITIONED = {"backend": "attnres", "options": {"backend": "aot_eager_decomp_partition"}}
_NEEDS_FLOAT64_ATTENTION = pytest.mark.skipif(
    torch.__version__ < (2, 12), reason="Inductor of torch 2.11 has no attention in float64 on a CPU"
)
pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:torch")


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()
    ar.reset_stats()


def _num_kept(model):
    """Count the numbers that a compiled call keeps for its backward, parameters apart."""
    tensors, many = {}, torch.zeros((4, 32), dtype=torch.long)
    model(many)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.setdefault(id(t), t), lambda t: t):
        model(many)
    parameters = {parameter.data_ptr() for parameter in model.parameters()}
    return sum(t.numel() for t in tensors.values() if t.data_ptr() not in parameters)


class TestItComputesTheRewrite:
    @pytest.mark.parametrize("schedule", ["direct", "two_phase", pytest.param("auto", marks=pytest.mark.slow)])
    @pytest.mark.parametrize("output", ["sum", "mean"])
    def test_in_float64(self, schedule, output):
        config = ar.AttnResConfig(block_size=2, schedule=schedule, output=output)
        assert_same(*attached(config=config), rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize(
        "variant",
        [
            {"num_heads": 4, "gate": True},
            {"key_rank": 5, "output": "mean", "recency_bias": 1.0},
            {"gate": True, "recency_bias": -1.0, "schedule": "two_phase"},
            {"recency_bias": 2.0, "schedule": "direct"},
        ],
    )
    def test_every_variant(self, variant):
        config = ar.AttnResConfig(block_size=2, **variant)
        assert_same(*attached(config=config), rtol=1e-10, atol=1e-10)

    @pytest.mark.slow
    @_NEEDS_FLOAT64_ATTENTION
    def test_a_variant_through_inductor(self):
        config = ar.AttnResConfig(num_heads=4, gate=True, recency_bias=1.0)
        assert_same(*attached(small(depth=1), config, backend="attnres"), rtol=1e-10, atol=1e-10)

    @_NEEDS_FLOAT64_ATTENTION
    def test_through_inductor(self):
        assert_same(*attached(small(depth=1), backend="attnres"), rtol=1e-10, atol=1e-10)

    def test_two_streams_side_by_side_and_one_behind_them(self):
        config = ar.AttnResConfig(block_size=2)
        model, inputs = mm_dit(single=2)
        new = ar.rewrite(copy.deepcopy(model), inputs, config=config, verify=False)
        ar.attach(model, config, inputs)
        with torch.no_grad():
            for parameter in ar.attnres_parameters(model):
                parameter.add_(torch.randn_like(parameter))
        new.load_state_dict(model.state_dict())
        model.compile(**QUICK)
        torch.testing.assert_close(model(*inputs), new(*inputs))

    def test_as_a_compiled_module_and_as_a_compiled_forward(self):
        model, new = attached()
        model._compiled_call_impl = None
        wanted = new(ids)
        torch.testing.assert_close(torch.compile(model, **QUICK)(ids), wanted)
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(model.forward, **QUICK)(ids=ids), wanted)

    def test_without_gains(self):
        assert_same(*attached(config=ar.AttnResConfig(num_blocks="full", key_norm=False)))

    def test_with_dropout_and_a_seed(self):
        model, new = attached(small(dropout=0.3).train())
        torch.manual_seed(1)
        found = model(ids)
        torch.manual_seed(1)
        torch.testing.assert_close(found, new(ids))
        torch.testing.assert_close(model.eval()(ids), new.eval()(ids))
        assert ar.stats()["rewritten graphs"] == 2

    def test_at_zero_queries_it_is_the_original(self):
        model = small()
        wanted = model(ids)
        ar.attach(model, CONFIG, (ids,))
        model.compile(**QUICK)
        torch.testing.assert_close(model(ids), wanted)

    def test_under_inference_mode_and_no_grad(self):
        model, new = attached()
        wanted = new(ids)
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                torch.testing.assert_close(model(ids), wanted)

    def test_under_autocast(self):
        model, new = attached(small().float())
        with torch.autocast("cpu", torch.bfloat16):
            found, wanted = model(ids), new(ids)
            torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
        assert found.dtype is torch.bfloat16
        found.float().square().mean().backward()
        assert all(parameter.grad.dtype is torch.float32 for parameter in model.parameters())

    def test_after_a_move_to_another_dtype(self):
        model, new = attached()
        model.float()(ids)
        if torch.__version__ < (2, 12):
            with pytest.raises(TypeError, match=r"torch 2\.11 does not compile anew"):
                model.double()(ids)
            torch.compiler.reset()
        assert_same(model.double(), new.float().double(), rtol=1e-10, atol=1e-10)
        if torch.__version__ < (2, 12):
            torch.compiler.reset()
        assert model.to(torch.bfloat16)(ids).dtype is torch.bfloat16

    def test_gradients_accumulate(self):
        model, new = attached()
        for module in (model, new):
            for batch in (ids, ids.flip(1)):
                module(batch).square().mean().backward()
        gradients = dict(new.named_parameters())
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, gradients[name].grad)

    @pytest.mark.slow
    def test_under_activation_checkpoints(self):
        class Checkpointed(Gpt):
            def forward(self, ids):
                x = self.embed(ids)
                for layer in self.layers:
                    x = checkpoint(layer, x, use_reentrant=False)
                return self.head(self.norm(x))

        plain = small()
        saving = Checkpointed(depth=2).double()
        saving.load_state_dict(plain.state_dict())
        kept = []
        for model in (plain, saving):
            torch._dynamo.reset()
            torch.manual_seed(0)
            model, new = attached(model, **PARTITIONED)
            assert_same(model, new)
            kept.append(_num_kept(model))
        assert kept[1] < 0.8 * kept[0]

    def test_an_optimizer_moves_what_the_compiled_model_reads(self):
        model, _ = attached()
        before = model(ids)
        optimizer = torch.optim.SGD(ar.attnres_parameters(model), lr=1.0)
        before.square().mean().backward()
        optimizer.step()
        assert not torch.allclose(model(ids), before)

    def test_parameters_that_were_replaced_are_read(self):
        model, new = attached()
        model(ids)
        state = {k: v + 0.5 if k.endswith("query") else v.clone() for k, v in model.state_dict().items()}
        model.load_state_dict(state, assign=True)
        new.load_state_dict(state)
        torch.testing.assert_close(model(ids), new(ids))

    def test_frozen_queries_get_no_gradient(self):
        model, _ = attached()
        model(ids).sum().backward()
        model.zero_grad()
        for parameter in ar.attnres_parameters(model):
            parameter.requires_grad_(False)
        model(ids).sum().backward()
        assert all(parameter.grad is None for parameter in ar.attnres_parameters(model))
        assert model.embed.weight.grad is not None

    def test_two_models_in_one_process(self):
        one, first = attached(small(depth=1))
        two, second = attached(small(), ar.AttnResConfig(num_blocks=3))
        for _ in range(2):
            torch.testing.assert_close(one(ids), first(ids))
            torch.testing.assert_close(two(ids), second(ids))

    def test_phase_1_results_of_the_kernels_are_made_again(self):
        model, _ = attached(small(depth=3).float(), ar.AttnResConfig(num_blocks=3), **PARTITIONED)
        out = model(ids)
        functional.reset_launches()
        out.square().mean().backward()
        launched = functional.launches()
        assert all(name.endswith(" (C++)") for name in launched)
        # of the blocks that have more than one finished source: the last two, and the read behind them all
        assert launched["inter_block.forward (C++)"] == 2
        assert "merge.forward (C++)" not in launched

    def test_plain_pytorch_that_is_only_traced_is_not_counted(self):
        functional.reset_launches()
        attached()[0](ids)
        assert functional.launches() == {}


class TestRecompiles:
    def test_a_second_call_recompiles_nothing(self):
        model, _ = attached()
        model(ids)
        with torch._dynamo.config.patch(error_on_recompile=True):
            model(ids)
            model(ids.clone())

    @pytest.mark.slow
    def test_a_new_length_recompiles_nothing_with_dynamic_shapes(self):
        model, new = attached(dynamic=True, **QUICK)
        model(ids)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for shape in ((2, 9), (3, 5), (4, 31)):
                model(torch.zeros(shape, dtype=torch.long))
        torch.testing.assert_close(model(ids), new(ids))

    @pytest.mark.slow
    def test_a_new_length_alone_makes_shapes_dynamic(self):
        model, _ = attached()
        for length in (8, 9, 10, 11):
            model(torch.zeros((2, length), dtype=torch.long))
        assert ar.stats()["rewritten graphs"] == 2


class TestStats:
    def test_graphs_reads_and_calls(self):
        model, _ = attached()
        model(ids)
        model(ids)
        assert ar.stats() == {"rewritten graphs": 1, "reads": 4, "rewritten calls": 2}

    def test_helpers_without_parameters_stay_as_they_are(self):
        torch.compile(lambda x: x * 2, backend="attnres", options={"backend": "eager"})(torch.ones(2))
        assert ar.stats() == {"plain graphs": 1}

    def test_what_follows_a_graph_break_behind_the_stream_stays_as_it_is(self):
        model, new = attached()
        model._compiled_call_impl = None
        scale = nn.Parameter(torch.full((1,), 3.0, dtype=torch.float64))

        def step(ids):
            out = model(ids)
            torch._dynamo.graph_break()
            return out * scale

        with torch.no_grad():
            torch.testing.assert_close(torch.compile(step, **QUICK)(ids), new(ids) * 3)
        assert ar.stats()["rewritten graphs"] == 1
        assert ar.stats()["plain graphs"] == 1


def test_the_entry_point_needs_no_import(tmp_path):
    code = (
        "import torch\n"
        "assert 'attnres' in torch._dynamo.list_backends(None)\n"
        "try: torch.compile(torch.nn.Linear(2, 2), backend='attnres')(torch.ones(1, 2))\n"
        "except Exception as error: assert 'NotAttachedError' in str(error), error\n"
        "else: raise SystemExit('no error')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr


CACHED = """
import sys, torch
import attnres_rewrite as ar, attnres_rewrite.backend as backend
from tests.attached import CONFIG, QUICK, assert_same, attached, ids, small
from tests.networks import Gpt
from torch._dynamo.utils import counters
backend.__version__ = sys.argv[2]
torch.manual_seed(0)
model, ids = Gpt(depth=1), torch.zeros(1, 4, dtype=torch.long)
ar.attach(model, ar.AttnResConfig(num_blocks=int(sys.argv[1])), (ids,))
model.compile(backend="attnres")
with torch.no_grad():
    model(ids)
print(counters["aot_autograd"]["autograd_cache_hit"], counters["inductor"]["fxgraph_cache_hit"])
"""


@pytest.mark.slow
def test_caches_are_used_until_the_config_or_the_version_changes(tmp_path):
    def hits(blocks, version):
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", CACHED, blocks, version],
            capture_output=True,
            text=True,
            env=environment | {"PYTHONPATH": str(Path(__file__).parents[1])},
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert hits("2", "1") == "0 0"
    assert hits("2", "1") == "1 1"
    assert hits("1", "1") == "0 0"
    assert hits("2", "2") == "0 0"


class TestDataParallel:
    @pytest.fixture
    def wrapped(self, tmp_path):
        model, new = attached()
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        yield nn.parallel.DistributedDataParallel(model), new
        torch.distributed.destroy_process_group()

    def test_gradients_are_those_of_one_process(self, wrapped):
        model, new = wrapped
        with torch._dynamo.config.patch(optimize_ddp=False):
            model(ids).square().mean().backward()
        new(ids).square().mean().backward()
        gradients = dict(new.named_parameters())
        for name, parameter in model.module.named_parameters():
            torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-12, atol=1e-12)

    def test_graphs_that_torch_would_cut_are_refused(self, wrapped):
        with pytest.raises(BackendCompilerFailed, match="optimize_ddp = False"):
            wrapped[0](ids)
