"""torch.compile(backend="attnres"): what it refuses, and what it says then."""

import inspect
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import attnres_rewrite as ar
from tests.attached import CONFIG, QUICK, attached, ids
from tests.networks import WIDTH, Block, Gpt

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:torch")


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()
    ar.reset_stats()


class BreaksInTheMiddle(Gpt):
    def forward(self, ids):
        x = self.embed(ids)
        for number, layer in enumerate(self.layers):
            if number == 2:
                torch._dynamo.graph_break()
            x = layer(x)
        return self.head(self.norm(x))


class Deep(Gpt):
    """Calls its first layer twice when told to."""

    def forward(self, ids, again=False):
        x = self.embed(ids)
        for layer in (self.layers[0], *self.layers) if again else self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class Parallel(nn.Module):
    """Attention and MLP side by side: nothing reads the state between them, unless it is asked for."""

    def __init__(self):
        super().__init__()
        self.layers, self.last, self.norm = nn.ModuleList([Block(), Block()]), Block(), nn.LayerNorm(WIDTH)

    def forward(self, x, states=False):
        between = x
        for layer in self.layers:
            h = layer.norm_1(x)
            between = x + layer.attn(h)
            x = between + layer.mlp(h)
        x = self.last(x)
        return (self.norm(x), self.norm(between)) if states else self.norm(x)


class TestRefusals:
    def refusal(self, model, *args, **kwargs):
        with pytest.raises(BackendCompilerFailed) as caught:
            model(*args, **kwargs)
        return str(caught.value)

    def test_a_model_that_was_not_attached(self):
        text = self.refusal(torch.compile(Gpt(), **QUICK), ids)
        assert "NotAttachedError" in text
        assert "attnres_rewrite.attach(model, attnres_rewrite.AttnResConfig(num_blocks=8))" in text

    def test_a_graph_break_in_the_stream(self):
        model = BreaksInTheMiddle()
        ar.attach(model, CONFIG, (ids,))
        model.compile(**QUICK)
        text = self.refusal(model, ids)
        lines, first = inspect.getsourcelines(BreaksInTheMiddle)
        (line,) = [first + offset for offset, line in enumerate(lines) if "graph_break()" in line]
        assert "GraphBreakError: a graph break cuts the stream" in text
        assert "User-inserted graph break" in text
        assert f"{Path(__file__).name}:{line}\n" in text
        assert ar.stats() == {}

    def test_a_graph_break_inside_a_compiled_function(self):
        model = BreaksInTheMiddle()
        ar.attach(model, CONFIG, (ids,))
        assert "GraphBreakError" in self.refusal(torch.compile(lambda ids: model(ids) * 2, **QUICK), ids)

    def test_another_stream_than_was_attached(self):
        model = Deep(depth=2)
        ar.attach(model, CONFIG, (ids,))
        model.compile(**QUICK)
        model(ids)
        text = self.refusal(model, ids, again=True)
        assert "StreamMismatchError" in text
        assert "6 updates and width 16; attach() found a stream of 4 updates" in text

    def test_a_state_that_has_no_query(self):
        model, x = Parallel(), torch.randn(2, 3, WIDTH)
        ar.attach(model, CONFIG, (x,))
        model.compile(**QUICK)
        model(x)
        text = self.refusal(model, x, states=True)
        assert "StreamMismatchError: this call reads state 3 of stream" in text
        assert "make the model return the same things" in text

    def test_two_calls_in_one_function(self):
        model, _ = attached()
        model._compiled_call_impl = None
        assert "2 calls of attached models" in self.refusal(torch.compile(lambda i: model(i) + model(i), **QUICK), ids)

    def test_another_backend_around_it(self):
        model, _ = attached()
        with pytest.raises(ar.NotCompiledError):
            torch.compile(lambda ids: model(ids) * 2, backend="aot_eager")(ids)

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"num_blocks": 4}, "'num_blocks': 4} contradicts attach(), which was given 2"),
            ({"num_blokcs": 2}, "unknown options ['num_blokcs']"),
            ({"backend": "attnres"}, "inside itself"),
            ({"backend": "nonesuch"}, "Invalid backend"),
            ({"backend": "aot_eager", "max_autotune": True}, "['max_autotune'] would be Inductor's"),
        ],
    )
    def test_options(self, options, says):
        model, _ = attached(backend="attnres", options=options)
        assert says in self.refusal(model, ids)

    def test_options_that_agree_with_attach(self):
        model, new = attached(backend="attnres", options={"backend": "aot_eager", "num_blocks": 2, "output": "sum"})
        torch.testing.assert_close(model(ids), new(ids))

    def test_a_checkpoint_without_queries(self):
        model, _ = attached()
        with pytest.raises(RuntimeError, match=r"Missing key.*layers\.0\.attn_res\.0\.query"):
            model.load_state_dict(Gpt().state_dict())
