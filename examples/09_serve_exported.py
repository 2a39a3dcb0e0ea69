"""Serve an attached model: take its rewrite, of the same parameters, export it to one file, run the file."""

import tempfile
from pathlib import Path

import gpt
import torch
from torch.export import Dim

import attnres_rewrite as ar

VOCAB, CONTEXT = 32, 24


def main() -> None:
    torch.manual_seed(0)
    config = ar.AttnResConfig(num_blocks=2)
    model = gpt.GPT(vocab=VOCAB, width=64, depth=2, context=CONTEXT)
    ids = torch.randint(0, VOCAB, (4, 16))
    ar.attach(model, config, args=(ids,))
    compiled = torch.compile(model, backend="attnres")
    with torch.no_grad():  # in place of a training run
        for parameter in ar.attnres_parameters(model):
            parameter.add_(torch.randn_like(parameter))
    request = torch.randint(0, VOCAB, (7, 11))
    model.eval()
    with torch.no_grad():
        wanted = compiled(request)

    # An attached model is its own code and a compiler; a rewritten one is a graph, with the same parameters.
    new = ar.as_rewritten(model, args=(ids,)).eval()

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "gpt.pt2"
        sizes = {0: Dim("batch"), 1: Dim("length", max=CONTEXT)}
        torch.export.save(torch.export.export(new, (ids,), dynamic_shapes=(sizes,)), path)
        served = torch.export.load(path).module()
        print(f"{path.name}: {path.stat().st_size:,} bytes, captured with ids {list(ids.shape)}")

    with torch.no_grad():
        found = served(request)
        with ar.original(model):
            plain = model(request)
    error, effect = ((found - other).abs().max().item() for other in (wanted, plain))
    print(f"ids {list(request.shape)}: {error:.0e} from the attached model, {effect:.2f} from the one without reads")
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert effect > 0.01


if __name__ == "__main__":
    main()
