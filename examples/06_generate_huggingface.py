"""Generate text with an attached model, through transformers' own generate() and its static key-value cache."""

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import attnres_rewrite as ar

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
PROMPT, NEW = 8, 12


def generate(model: LlamaForCausalLM, prompt: Tensor) -> Tensor:
    # a cache of fixed size: one graph for the prompt, one for all next tokens
    settings = {"cache_implementation": "static", "do_sample": False, "max_new_tokens": NEW}
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), pad_token_id=0, **settings)


def main() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=128, eos_token_id=None, **SMALL)).eval()
    prompt = torch.randint(3, 128, (2, PROMPT))
    before = generate(model, prompt)

    ar.attach(model, ar.AttnResConfig(num_blocks=2))
    model.compile(backend="attnres")
    after = generate(model, prompt)
    stats = ar.stats()
    print(f"zero queries: the original's tokens, by {stats['rewritten graphs']} graphs and {stats['reads']} reads")
    assert torch.equal(after, before)
    assert stats["rewritten graphs"] == 2
    assert stats["rewritten calls"] == NEW

    # Other queries make another network, whose cache holds what its own reads gave.
    with torch.no_grad():
        for parameter in ar.attnres_parameters(model):
            parameter.add_(torch.randn_like(parameter))
    other = generate(model, prompt)
    with torch.inference_mode():
        from_scratch = model(input_ids=other[:, :-1], use_cache=False).logits.argmax(-1)
    changed = int((other != before).sum())
    print(f"random queries: {changed} of {before[:, PROMPT:].numel()} tokens differ, with and without a cache alike")
    assert changed
    assert torch.equal(other[:, PROMPT:], from_scratch[:, PROMPT - 1 :])


if __name__ == "__main__":
    main()
