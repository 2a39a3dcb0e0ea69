"""Attach reads to a vision transformer of timm, compile it, and take training steps."""

import timm
import torch
from torch.nn import functional as F

import attnres_rewrite as ar

STEPS = 8


def main() -> None:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "num_heads": 4, "depth": 2}
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=10, **sizes)
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    before = model(images)

    report = ar.attach(model, ar.AttnResConfig(num_blocks=2), args=(images,))
    stream = report.streams[0]
    print(f"{stream.num_updates} updates of width {stream.width}, {len(stream.reads)} reads")
    model.compile(backend="attnres")
    torch.testing.assert_close(model(images), before, rtol=1e-4, atol=1e-5)

    reads = ar.attnres_parameters(model)
    rest = [parameter for name, parameter in model.named_parameters() if "attn_res" not in name]
    groups = [{"params": rest}, {"params": reads, "weight_decay": 0.0, "lr": 1e-2}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    losses = []
    for _ in range(STEPS):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f} in {STEPS} steps")
    assert losses[-1] < losses[0]
    assert all(parameter.any() for parameter in reads)


if __name__ == "__main__":
    main()
