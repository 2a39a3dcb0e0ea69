"""Train an attached model with the Trainer of transformers, resume it from a checkpoint, save it and load it again."""

import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments

import attnres_rewrite as ar

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = torch.randint(3, 128, (64, 16), generator=torch.Generator().manual_seed(0))


def build() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=128, **SMALL))
    ar.attach(model, ar.AttnResConfig(num_blocks=2))
    model.compile(backend="attnres")
    return model


def train(model: LlamaForCausalLM, folder: Path, resume_from: Path | None = None) -> list[float]:
    reads = ar.attnres_parameters(model)
    rest = [parameter for name, parameter in model.named_parameters() if "attn_res" not in name]
    groups = [{"params": rest, "weight_decay": 0.1}, {"params": reads, "weight_decay": 0.0, "lr": 1e-2}]
    settings = {"max_steps": 20, "save_steps": 10, "logging_steps": 1, "per_device_train_batch_size": 4}
    args = TrainingArguments(folder, **settings, use_cpu=True, report_to=[], disable_tqdm=True)
    data = [{"input_ids": row, "labels": row} for row in IDS]
    trainer = Trainer(model, args, train_dataset=data, optimizers=(torch.optim.AdamW(groups, lr=1e-3), None))
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=resume_from and str(resume_from))
    trainer.save_model(folder / "final")
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    model = build()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        losses = train(model, folder / "first")
        resumed = train(build(), folder / "second", resume_from=folder / "first" / "checkpoint-10")
        print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; resumed after step 10 it ends at {resumed[-1]:.3f}")
        assert losses[-1] < losses[0]
        assert resumed[10:] == losses[10:]

        # config.json has the AttnResConfig, and attach() takes it and the queries from the folder.
        again = LlamaForCausalLM.from_pretrained(folder / "first" / "final")
        report = ar.attach(again)
        again.compile(backend="attnres")
        want, got = (net(input_ids=IDS[:4], labels=IDS[:4]).loss.item() for net in (model, again))
    print(f"loaded with {report.config['num_blocks']} blocks: loss {got:.6f}, before it was saved {want:.6f}")
    assert abs(got - want) < 1e-5
    assert all(query.any() for query in ar.attnres_parameters(again))


if __name__ == "__main__":
    main()
