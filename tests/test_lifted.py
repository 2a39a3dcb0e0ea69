"""Mirrors attnres_rewrite/lifted.py: the float64 copies that the proofs run on."""

import torch
from torch import Tensor, nn

import attnres_rewrite as ar


class Squaring(nn.Module):
    """A stream whose updates are cubic in it, held back by nothing but the batch norms."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm1d(8) for _ in range(depth))
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for norm, layer in zip(self.norms, self.layers, strict=True):
            h = norm(x)
            x = x + layer(h * h * h)
        return x


def test_an_untrained_batch_norm_in_eval_mode_does_not_drown_the_proof_in_rounding():
    torch.manual_seed(0)
    model = Squaring(depth=6).eval()
    new = ar.rewrite(model, (torch.randn(16, 8),), config=ar.AttnResConfig(block_size=2, output="sum"))
    assert new.report.verify is not None
    assert max(proof.output_error for proof in new.report.verify.proofs if proof.dtype == "float64") < 1e-12
    assert all(bool((norm.running_var == 1).all()) for norm in model.norms)
