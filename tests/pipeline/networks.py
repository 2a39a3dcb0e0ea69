"""The networks whose pipelines are compared with one process: rewritten, float64, random queries."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import attnres_rewrite as ar
from tests.joint import WIDTH, MmDit
from tests.networks import VOCAB, Gpt

BATCH, LENGTH = 2, 6
CONFIG = ar.AttnResConfig(num_blocks=4)


def gpt() -> nn.Module:
    """Return a GPT with a tied head."""
    return Gpt(depth=4)


def gpt_frozen() -> nn.Module:
    """Return a GPT whose embedding, and with it its head, is frozen."""
    model = gpt()
    model.embed.weight.requires_grad_(False)
    return model


def llama() -> nn.Module:
    """Return a Llama with grouped-query attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, num_hidden_layers=4, num_key_value_heads=2, **sizes))


def gpt2() -> nn.Module:
    """Return a GPT-2 with a tied head that trains with dropout, in its attention as well."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=4, n_head=2, n_positions=16)).train()


def t5() -> nn.Module:
    """Return an encoder and a decoder: two streams, and a value that every decoder layer reads."""
    from transformers import T5Config, T5ForConditionalGeneration

    sizes: dict[str, Any] = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, num_layers=2, **sizes))


def kimi() -> nn.Module:
    """Return a Kimi Linear: delta attention, latent attention and a mixture of experts."""
    from transformers import KimiLinearConfig, KimiLinearForCausalLM

    from tests.zoo.tiny_config import tiny_config

    sizes = {"num_hidden_layers": 4, "q_lora_rank": None, "moe_intermediate_size": 32}
    heads = {"linear_head_dim": 16, "linear_num_heads": 4}
    kinds = {"layer_types": ["linear_attention", "full_attention"] * 2, "mlp_layer_types": ["dense"] + ["sparse"] * 3}
    return KimiLinearForCausalLM(tiny_config(KimiLinearConfig, sizes | heads | kinds))


def mm_dit() -> nn.Module:
    """Return image and text side by side, two streams that read each other, and then layers of both in one."""
    model = MmDit(depth=3, single=4)
    model.head = nn.Linear(WIDTH, VOCAB)
    return model


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    builder.__name__: builder for builder in (gpt, gpt_frozen, llama, gpt2, t5, kimi, mm_dit)
}


def inputs_of(name: str, batch: int) -> dict[str, Tensor]:
    """Return the inputs of a network by name."""
    if name == "mm_dit":
        sizes = {"image": (LENGTH, WIDTH), "text": (3, WIDTH), "condition": (WIDTH,)}
        return {each: torch.randn(batch, *size, dtype=torch.float64) for each, size in sizes.items()}
    names = {"gpt": ["ids"], "gpt_frozen": ["ids"], "t5": ["input_ids", "decoder_input_ids"]}.get(name, ["input_ids"])
    return {each: torch.randint(0, VOCAB, (batch, LENGTH)) for each in names}


def rewritten(name: str) -> ar.RewrittenModule:
    """Return the same network with the same parameters in every process."""
    torch.manual_seed(0)
    model = BUILDERS[name]().double()
    model = model if name == "gpt2" else model.eval()
    inputs = inputs_of(name, BATCH)
    fixed: dict[str, Any] = {} if name in ("gpt", "gpt_frozen", "mm_dit") else {"use_cache": False}
    new = ar.rewrite(model, (), inputs | fixed, CONFIG, verify=False, dynamic_shapes={})
    with torch.no_grad():
        for parameter in ar.attnres_parameters(new):
            parameter.add_(torch.randn_like(parameter))
    return new
