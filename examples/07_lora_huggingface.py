"""Fine-tune an attached model with LoRA: the base is frozen, the adapters and the queries train and are saved."""

import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import attnres_rewrite as ar

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
STEPS = 20


def main() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=128, **SMALL))
    ar.attach(model, ar.AttnResConfig(num_blocks=2))
    model.compile(backend="attnres")

    # peft freezes all that it does not know; modules_to_save trains the queries and puts them into the adapter's file.
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["attn_res"])
    adapted = get_peft_model(model, lora)
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    frozen = {name: p.clone() for name, p in adapted.named_parameters() if not p.requires_grad}
    reads = ar.attnres_parameters(adapted)
    adapters = {name: p for name, p in trained.items() if "lora_" in name}
    print(f"{len(adapters)} parameters of adapters and {len(reads)} of reads train; {len(frozen)} are frozen")
    assert len(trained) == len(reads) + len(adapters)

    groups = [{"params": list(adapters.values())}, {"params": reads, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    ids = torch.randint(3, 128, (4, 16))
    losses = []
    for _ in range(STEPS):
        loss = adapted(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {STEPS} steps, the base weights as they were")
    assert losses[-1] < losses[0]
    assert all(torch.equal(adapted.get_parameter(name), weight) for name, weight in frozen.items())
    assert all(parameter.any() for parameter in trained.values())

    with tempfile.TemporaryDirectory() as folder:
        adapted.save_pretrained(folder)
        saved = load_file(Path(folder) / "adapter_model.safetensors")
        assert len(saved) == len(trained)
        print(f"the adapter's file holds {sum('.query' in name for name in saved)} queries")


if __name__ == "__main__":
    main()
