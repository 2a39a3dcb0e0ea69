"""Rewrite a Hugging Face model, run it, save it and load it again.

Any pre-norm model works the same way; this one is a small Qwen3 with random weights.
"""

import tempfile
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

import attnres_rewrite as ar


def main() -> None:
    torch.manual_seed(0)
    config = Qwen3Config.from_pretrained(Path(__file__).parent / "qwen3_small", use_cache=False)
    model = Qwen3ForCausalLM(config).eval()
    ids = torch.randint(0, config.vocab_size, (2, 16))

    new = ar.rewrite(model, kwargs={"input_ids": ids}, config=ar.AttnResConfig(num_blocks=4))

    stream = new.report.streams[0]
    print(f"{stream.num_updates} updates in {len(stream.blocks)} blocks, {len(stream.reads)} reads")
    for proof in new.report.verify.proofs:
        print(f"proof {proof.name} ({proof.mode}, {proof.dtype}): {proof.output_error:.1e}")

    # At zero queries nothing has changed, ...
    with torch.no_grad():
        before, after = model(input_ids=ids).logits, new(input_ids=ids).logits
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)

    # ... and what is saved is what is loaded.
    with tempfile.TemporaryDirectory() as folder:
        path = ar.save(new, Path(folder) / "qwen3.attnres")
        again = ar.load(path)
        torch.testing.assert_close(again(input_ids=ids).logits, after)
        print(f"saved {path.name}: {sum(p.numel() for p in again.parameters()):,} parameters")


if __name__ == "__main__":
    main()
