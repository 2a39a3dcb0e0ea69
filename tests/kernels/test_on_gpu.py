"""What only a GPU shows: addresses beyond 32 bits, CUDA graphs, the whole way through torch.compile."""

import copy

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import attnres_rewrite as ar
from attnres_rewrite import functional as F
from tests.networks import Gpt

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:torch"),
]
WIDTH, TAIL = 7168, 8
# more than 2**31 elements, so 4 GiB in bfloat16
TOKENS = 2**31 // WIDTH + 1000


def large(count: int) -> list[Tensor]:
    # these, their gradients, and as much again between the operations
    needed = 4 * count * 2 * TOKENS * WIDTH
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory")
    tensors = [torch.empty(TOKENS, WIDTH, dtype=torch.bfloat16, device="cuda") for _ in range(count)]
    for tensor in tensors:
        tensor.normal_()
    return [tensor.requires_grad_() for tensor in tensors]


def vectors(count: int) -> list[Tensor]:
    return [torch.randn(WIDTH, device="cuda").mul_(0.05).requires_grad_() for _ in range(count)]


def assert_rows_agree(call, rows: list[Tensor], queries: list[Tensor]) -> None:
    """Compare the last rows of a large call with a call on these rows alone: every row is worked out by itself."""
    small = [row[-TAIL:].detach().clone().requires_grad_() for row in rows]
    twins = [query.detach().clone().requires_grad_() for query in queries]
    F.reset_launches()
    out, wanted = call(rows, queries), call(small, twins)
    assert not any("plain" in name for name in F.launches())
    torch.testing.assert_close(out[-TAIL:], wanted, rtol=0, atol=0)
    weights = torch.randn_like(wanted)
    # the gradient of everything else is zero, so those of the queries are the small call's, too
    (out[-TAIL:] * weights).sum().backward()
    (wanted * weights).sum().backward()
    for row, twin in zip(rows, small, strict=True):
        torch.testing.assert_close(row.grad[-TAIL:], twin.grad, rtol=0, atol=0)
        assert not row.grad[:TAIL].any()
    for query, twin in zip(queries, twins, strict=True):
        # the same terms in another order: where they cancel, the rounding of the sums is not small beside what is left
        assert (query.grad - twin.grad).norm() <= 1e-6 * twin.grad.norm()


def test_a_read_of_tensors_over_four_gib():
    assert_rows_agree(lambda rows, queries: F.attn_res_read(rows, queries[0]), large(2), vectors(1))


def test_two_phases_over_four_gib():
    def call(rows: list[Tensor], queries: list[Tensor]) -> Tensor:
        outs, lses = F.inter_block(rows[:2], queries)
        return F.add_merge_norm(rows[2], rows[3], outs[1], lses[1], queries[1], None, None, None, 1e-6)[1]

    assert_rows_agree(call, large(4), vectors(2))


def model_and_ids() -> tuple[Gpt, Tensor]:
    return Gpt(depth=4).cuda(), torch.arange(64, device="cuda").reshape(4, 16) % 31


def with_random_queries(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in ar.attnres_parameters(model):
            parameter.add_(torch.randn_like(parameter))


def assert_steps_agree(one, other, ids: Tensor, *, rounds: int) -> None:
    for _ in range(rounds):
        for module in (one, other):
            module.zero_grad()
        found, wanted = one(ids), other(ids)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
        found.square().mean().backward()
        wanted.square().mean().backward()
        gradients = dict(other.named_parameters())
        for name, parameter in one.named_parameters():
            wanted_gradient = gradients[name.removeprefix("_orig_mod.")].grad
            torch.testing.assert_close(parameter.grad, wanted_gradient, rtol=1e-2, atol=1e-4)


def test_cuda_graphs():
    torch._dynamo.reset()
    counters.clear()
    model, ids = model_and_ids()
    new = ar.rewrite(model, (ids,), config=ar.AttnResConfig(num_blocks=4), verify=False)
    with_random_queries(new)
    plain = copy.deepcopy(new)
    compiled = torch.compile(new, mode="reduce-overhead", fullgraph=True)
    F.reset_launches()
    assert_steps_agree(compiled, plain, ids, rounds=4)
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert {"inter_block.forward", "inter_block.backward", "add_merge_norm.forward"} <= F.launches().keys()


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_the_backend(mode):
    torch._dynamo.reset()
    counters.clear()
    model, ids = model_and_ids()
    new = ar.rewrite(copy.deepcopy(model), (ids,), config=ar.AttnResConfig(num_blocks=4), verify=False)
    ar.attach(model, ar.AttnResConfig(num_blocks=4), (ids,))
    with_random_queries(model)
    new.load_state_dict(model.state_dict())
    model.compile(backend="attnres", mode=mode)
    F.reset_launches()
    assert_steps_agree(model, new, ids, rounds=4)
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert {"inter_block.forward", "inter_block.backward", "add_merge_norm.forward"} <= F.launches().keys()
    assert not any("plain" in name for name in F.launches())
