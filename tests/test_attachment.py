import copy
import inspect
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import attnres_rewrite as ar
from tests.networks import VOCAB, WIDTH, Block, Gpt

CONFIG = ar.AttnResConfig(num_blocks=3)
QUICK = {"backend": "attnres", "options": {"backend": "aot_eager"}}
ids = torch.arange(16).reshape(2, 8) % VOCAB


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()


@pytest.fixture
def attached():
    model = Gpt()
    ar.attach(model, CONFIG, (ids,))
    return model


def test_parameters_are_those_of_rewrite(attached):
    new = ar.rewrite(Gpt(), (ids,), config=CONFIG, verify=False)
    assert attached.state_dict().keys() == new.state_dict().keys()
    for name, value in attached.state_dict().items():
        assert value.shape == new.state_dict()[name].shape
    assert not any(name.endswith("query") and value.any() for name, value in attached.state_dict().items())


def test_the_report_says_what_was_found():
    model = Gpt()
    report = ar.attach(model, CONFIG, (ids,))
    assert report.streams[0].num_updates == 6
    queries = {name for name, _ in model.named_parameters() if name.endswith("query")}
    assert {read.query_name for read in report.reads} == queries
    assert report.model == "Gpt"


def test_it_stays_the_same_object_of_the_same_class_by_name(attached):
    assert isinstance(attached, Gpt)
    assert type(attached).__name__ == "Gpt"
    assert type(attached).__module__ == Gpt.__module__
    assert inspect.signature(attached.forward) == inspect.signature(Gpt().forward)


def test_uncompiled_calls_raise(attached):
    with pytest.raises(ar.NotCompiledError, match="not through the backend"):
        attached(ids)
    with pytest.raises(ar.NotCompiledError):
        attached.forward(ids)


def test_original_runs_the_network_without_its_reads(attached):
    plain = Gpt()
    plain.load_state_dict({k: v for k, v in attached.state_dict().items() if "attn_res" not in k})
    with ar.original(attached):
        torch.testing.assert_close(attached(ids), plain(ids), rtol=0, atol=0)
    with pytest.raises(ar.NotCompiledError):
        attached(ids)


def test_an_object_made_anew_from_its_class_is_not_attached(attached):
    fresh = type(attached)()
    fresh(ids)
    with pytest.raises(ar.NotAttachedError):
        ar.detach(fresh)
    ar.attach(fresh, CONFIG, (ids,))
    assert type(fresh) is type(attached)
    ar.detach(fresh)
    assert type(fresh) is Gpt


def test_who_unwraps_the_forward_finds_the_mark(attached):
    assert inspect.signature(attached.forward) == inspect.signature(Gpt().forward)
    with pytest.raises(ar.NotCompiledError):
        inspect.unwrap(type(attached).forward)(attached, ids)


def test_a_forward_that_was_kept_is_that_of_the_model_after_detach(attached):
    kept = attached.forward
    ar.detach(attached)
    torch.testing.assert_close(kept(ids), attached(ids))


def test_a_class_that_dynamo_may_not_look_into_runs_compiled():
    # diffusers marks several of its models so
    model = torch._dynamo.allow_in_graph(type("Marked", (Gpt,), {}))()
    original = model(ids)
    ar.attach(model, args=(ids,))
    with torch.no_grad():
        for parameter in ar.attnres_parameters(model):
            parameter.add_(torch.randn_like(parameter))
    wanted = ar.as_rewritten(model, (ids,))(ids)
    assert not torch.allclose(wanted, original)
    model.compile(**QUICK)
    torch.testing.assert_close(model(ids), wanted)
    with ar.original(model):
        torch.testing.assert_close(model(ids), original)


def test_original_nests_and_ends_with_an_error(attached):
    with ar.original(attached):
        with ar.original(attached):
            attached(ids)
        attached(ids)
        with pytest.raises(KeyError), ar.original(attached):
            raise KeyError
        attached(ids)
    with pytest.raises(ar.NotCompiledError):
        attached(ids)


def test_original_of_a_compiled_model(attached):
    with torch.no_grad():
        for parameter in ar.attnres_parameters(attached):
            parameter.add_(torch.randn_like(parameter))
    attached.compile(**QUICK)
    mixed = attached(ids)
    with ar.original(attached):
        plain = attached(ids)
        assert ar.stats()["original graphs"] >= 1
    again = attached(ids)
    assert not torch.allclose(mixed, plain)
    torch.testing.assert_close(again, mixed, rtol=0, atol=0)


def test_originals_of_two_threads_that_overlap(attached):
    first, second = ar.original(attached), ar.original(attached)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    attached(ids)
    second.__exit__(None, None, None)
    with pytest.raises(ar.NotCompiledError):
        attached(ids)


def test_the_first_compiled_call_inside_original_is_in_another_thread(attached):
    attached.compile(**QUICK)
    with ar.original(attached), ThreadPoolExecutor(1) as pool:
        found = pool.submit(attached, ids).result()
        torch.testing.assert_close(found, type(attached)._attnres_base.forward(attached, ids))


def test_a_copy_made_inside_original_is_not_inside(attached):
    with ar.original(attached):
        copies = copy.deepcopy(attached), copy.copy(attached), pickle.loads(pickle.dumps(attached))
        attached(ids)
    for each in copies:
        with pytest.raises(ar.NotCompiledError):
            each(ids)


def test_detach_leaves_nothing_behind(attached):
    before = Gpt()
    attached.compile(**QUICK)
    attached(ids)
    ar.detach(attached)
    assert type(attached) is Gpt
    assert attached.state_dict().keys() == before.state_dict().keys()
    assert attached.__dict__.keys() - {"_compiled_call_impl"} == before.__dict__.keys()
    assert [name for name, _ in attached.named_modules()] == [name for name, _ in before.named_modules()]
    attached(ids)
    ar.attach(attached, CONFIG, (ids,))


def test_a_part_of_a_larger_module_is_found():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Gpt()
            self.scale = nn.Parameter(torch.full((1,), 2.0))

        def forward(self, ids):
            return self.inner(ids) * self.scale

    model = Wrapped()
    with torch.no_grad():
        wanted = model(ids)
    ar.attach(model.inner, CONFIG, (ids,))
    assert len(ar.attnres_parameters(model)) == 12
    with ar.original(model):
        torch.testing.assert_close(model(ids), wanted)
    torch.testing.assert_close(torch.compile(model, **QUICK)(ids), wanted)
    ar.detach(model)
    assert type(model.inner) is Gpt


def test_copies_and_pickles_are_attached_too(attached, tmp_path):
    with torch.no_grad():
        for parameter in ar.attnres_parameters(attached):
            parameter.add_(torch.randn_like(parameter))
    torch.save(attached, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    copies = [copy.deepcopy(attached), pickle.loads(pickle.dumps(attached)), loaded]
    attached.compile(**QUICK)
    wanted = attached(ids)
    for twin in copies:
        assert type(twin) is type(attached)
        with pytest.raises(ar.NotCompiledError):
            twin(ids)
        twin.compile(**QUICK)
        torch.testing.assert_close(twin(ids), wanted, rtol=0, atol=0)
        # it is its own parameters that it reads
        with torch.no_grad():
            for parameter in ar.attnres_parameters(twin):
                parameter.zero_()
        assert not torch.allclose(twin(ids), wanted)
    torch.testing.assert_close(attached(ids), wanted, rtol=0, atol=0)


def test_a_container_owns_no_read():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.fn = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))

        def forward(self, x):
            return x + self.fn(x)

    model = nn.Sequential(*(Residual() for _ in range(3)), nn.LayerNorm(WIDTH))
    x = torch.randn(2, 4, WIDTH)
    wanted = model(x)
    ar.attach(model, ar.AttnResConfig(num_blocks=3), (x,))
    # the last norm is called by the root, and nothing else could own its read: one more child, which does nothing
    assert [name for name, _ in model.named_parameters() if name.endswith("query")] == [
        "1.attn_res.0.query",
        "2.attn_res.0.query",
        "attn_res.0.query",
    ]
    model.compile(**QUICK)
    torch.testing.assert_close(model(x), wanted)


def test_on_the_meta_device():
    with torch.device("meta"):
        model = Gpt()
        report = ar.attach(model, CONFIG, (torch.zeros(2, 8, dtype=torch.long),))
    assert len(report.reads) == 6
    assert all(parameter.is_meta for parameter in ar.attnres_parameters(model))


@pytest.mark.parametrize("name", ["Llama", "T5", "ViT"])
def test_a_transformers_model_needs_no_inputs(name):
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    make = {
        "Llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**small, vocab_size=50)),
        "T5": lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
        ),
        "ViT": lambda: transformers.ViTForImageClassification(
            transformers.ViTConfig(**small, image_size=32, patch_size=16)
        ),
    }
    report = ar.attach(make[name](), ar.AttnResConfig(num_blocks=2))
    assert [stream.num_updates for stream in report.streams] == ([4, 6] if name == "T5" else [4])


class TestBadInput:
    def test_twice(self, attached):
        with pytest.raises(ar.AlreadyRewrittenError, match="detach"):
            ar.attach(attached, CONFIG, (ids,))
        with pytest.raises(ar.AlreadyRewrittenError):
            ar.rewrite(attached, (ids,))

    def test_a_model_that_holds_an_attached_one(self, attached):
        with pytest.raises(ar.AlreadyRewrittenError):
            ar.attach(nn.Sequential(attached), CONFIG, (ids,))

    def test_no_inputs(self):
        with pytest.raises(ValueError, match=r"args=\(ids,\)"):
            ar.attach(Gpt(), CONFIG)

    def test_no_stream(self):
        model = nn.Linear(3, 3)
        with pytest.raises(ar.NoStreamError):
            ar.attach(model, None, (torch.randn(2, 3),))
        assert type(model) is nn.Linear
        assert len(list(model.parameters())) == 2

    def test_post_norm(self):
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True)
        model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        with pytest.raises(ar.PostNormError):
            ar.attach(model, None, (torch.randn(2, 4, WIDTH),))

    def test_a_compiled_model(self):
        with pytest.raises(TypeError, match="before torch.compile"):
            ar.attach(torch.compile(Gpt()), CONFIG, (ids,))

    def test_a_graph(self):
        with pytest.raises(TypeError, match="rewrite"):
            ar.attach(torch.fx.symbolic_trace(Block()), CONFIG, (torch.randn(2, 4, WIDTH),))

    def test_what_is_no_module(self):
        with pytest.raises(TypeError, match="nn.Module"):
            ar.attach("gpt", CONFIG, (ids,))

    def test_a_forward_that_was_replaced(self):
        model = Gpt()
        model.forward = lambda ids: ids
        with pytest.raises(TypeError, match="attach first"):
            ar.attach(model, CONFIG, (ids,))

    def test_more_blocks_than_updates(self):
        model = Gpt()
        with pytest.raises(ValueError, match="6 updates"):
            ar.attach(model, ar.AttnResConfig(num_blocks=7), (ids,))
        model(ids)

    @pytest.mark.parametrize("call", [ar.detach, ar.attnres_parameters, lambda model: ar.original(model).__enter__()])
    def test_a_model_without_reads(self, call):
        with pytest.raises(ar.NotAttachedError, match=r"attach\(model"):
            call(Gpt())

    def test_torch_export(self, attached):
        with pytest.raises(ar.NotCompiledError, match="rewrite"):
            torch.export.export(attached, (ids,))

    def test_a_query_that_was_deleted(self, attached):
        del attached.layers[1].attn_res
        attached.compile(**QUICK)
        with pytest.raises(ar.NotAttachedError, match=r"lost layers\.1\.attn_res\.0\.query"):
            attached(ids)
