"""Vision models of timm: some counted by hand, and a varied sweep. timm is imported only to build."""

import importlib
from functools import partial
from typing import Any

import torch
from torch import nn

from tests.zoo.spec import BATCH, HIDDEN, LAYERS, Inputs, Spec, noise, redraw
from tests.zoo.torchvision_cure import define_missing_ops

VIT: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": HIDDEN,
    "depth": LAYERS,
    "num_heads": 4,
}
MIXER = {"img_size": 32, "patch_size": 8, "embed_dim": HIDDEN, "num_blocks": LAYERS}
SWIN = {"patch_size": 2, "window_size": 4, "embed_dim": 32}
TWO_A_LAYER = (2 * LAYERS,)


def build(architecture: str, fields: dict[str, Any]) -> nn.Module:
    """Build a timm model at random weights, from its name or from its class ("file.Class")."""
    define_missing_ops()
    import timm

    torch.manual_seed(0)
    if "." not in architecture:
        return redraw(timm.create_model(architecture, pretrained=False, num_classes=10, **fields))
    file, model_class = architecture.split(".")
    chosen = getattr(importlib.import_module(f"timm.models.{file}"), model_class)
    return redraw(chosen(num_classes=10, **fields))


def _images(size: int) -> Inputs:
    return {"x": noise(BATCH, 3, size, size)}


def _timm(name: str, architecture: str, expected: tuple[int, ...] | None, image: int, fields: dict[str, Any]) -> Spec:
    return Spec(name, "timm", partial(build, architecture, fields), partial(_images, image), expected)


def hand_counted_timm() -> list[Spec]:
    """timm models whose updates were counted by hand."""
    counted = partial(_timm, image=32)
    return [
        counted("timm_vit", "vit_tiny_patch16_224", TWO_A_LAYER, fields=VIT),
        counted("timm_deit3", "deit3_small_patch16_224", TWO_A_LAYER, fields=VIT),
        counted("timm_eva02", "eva02_tiny_patch14_224", TWO_A_LAYER, fields=VIT),
        counted("timm_beit", "beit_base_patch16_224", TWO_A_LAYER, fields=VIT),
        counted("timm_vit_relpos", "vit_relpos_small_patch16_224", TWO_A_LAYER, fields=VIT),
        counted("timm_vit_parallel", "vit_small_patch16_18x2_224", TWO_A_LAYER, fields=VIT),
        counted("timm_mixer", "mlp_mixer.MlpMixer", TWO_A_LAYER, fields=MIXER),
        # the head that pools by attention has one residual MLP on a root of its own, which is no stream
        counted("timm_siglip", "vit_base_patch16_siglip_224", TWO_A_LAYER, fields=VIT),
        counted(
            "timm_swin",
            "swin_tiny_patch4_window7_224",
            (4, 4),
            fields=SWIN | {"img_size": 32, "depths": (2, 2), "num_heads": (2, 4)},
        ),
        _timm(
            "timm_swin_four_stages",
            "swin_tiny_patch4_window7_224",
            (2, 2, 2, 2),
            64,
            SWIN | {"img_size": 64, "depths": (1, 1, 1, 1), "num_heads": (2, 2, 4, 4)},
        ),
    ]


STAGES: dict[str, Any] = {"depths": (1, 1, 2, 1)}
# fmt: off
# architecture -> side of the image, arguments of its constructor
SWEPT: dict[str, tuple[int, dict[str, Any]]] = {
    "aimv2_large_patch14_224": (32, VIT),
    "beitv2_base_patch16_224": (32, VIT),
    "cait_xxs24_224": (32, VIT),
    "coat_tiny": (64, {"img_size": 64, "serial_depths": (1, 1, 1, 1), "parallel_depth": 1}),
    "coatnet_nano_rw_224": (64, {"img_size": 64}),
    "convit_tiny": (32, VIT),
    "convmixer.ConvMixer": (32, {"dim": 64, "depth": LAYERS, "patch_size": 4, "kernel_size": 3}),
    "convnext_atto": (64, STAGES | {"dims": (16, 32, 64, 64)}),
    "convnextv2_atto": (64, STAGES | {"dims": (16, 32, 64, 64)}),
    "crossvit_tiny_240": (240, {}),
    "davit_tiny": (64, {"depths": (1, 1, 2, 1), "embed_dims": (16, 32, 64, 64), "num_heads": (2, 2, 4, 4)}),
    "deit_tiny_distilled_patch16_224": (32, VIT),
    "densenet121": (64, {"block_config": (2, 2), "growth_rate": 8}),
    "edgenext_xx_small": (64, {}),
    "efficientformer_l1": (224, {}),
    "efficientnet_b0": (64, {}),
    "efficientvit_b0": (64, {}),
    "eva02_base_patch16_clip_224": (32, VIT),
    "fastvit_t8": (64, {}),
    "flexivit_small": (32, VIT),
    "focalnet.FocalNet": (64, {"depths": (1, 1, 2, 1), "embed_dim": 16}),
    "gcvit.GlobalContextVit": (
        64, {"img_size": 64, "depths": (1, 1, 2, 1), "embed_dim": 16, "window_size": 2}),
    "gmlp_ti16_224": (64, {"img_size": 64}),
    "hiera_tiny_224": (64, {"img_size": (64, 64), "embed_dim": 32, "stages": (1, 1, 2, 1)}),
    "inception_next_atto": (64, {}),
    "levit_128s": (224, {}),
    "mambaout_femto": (64, STAGES | {"dims": (16, 32, 64, 64)}),
    "metaformer.MetaFormer": (64, {"depths": (1, 1, 2, 1), "dims": (16, 32, 64, 64)}),
    "mobilevit_xxs": (64, {}),
    "naflexvit_base_patch16_gap": (
        32, {"patch_size": 8, "embed_dim": HIDDEN, "depth": LAYERS, "num_heads": 4}),
    "nest.Nest": (
        64, {"img_size": 64, "embed_dims": (32, 64, 64), "num_heads": (2, 4, 4), "depths": (1, 1, 2)}),
    "pit_ti_224": (224, {}),
    "pvt_v2_b0": (64, {}),
    "regnetx_002": (64, {}),
    "repvit_m0_9": (64, {}),
    "resmlp_12_224": (64, {"img_size": 64}),
    "resnet18": (64, {}),
    "samvit_base_patch16_224": (32, VIT | {"window_size": 2, "global_attn_indexes": (2,)}),
    "sequencer2d_s": (
        64, {"layers": (1, 1, 2, 1), "embed_dims": (32, 64, 64, 64), "hidden_sizes": (8, 16, 16, 16)}),
    "swiftformer_xs": (224, {}),
    "swinv2_cr_tiny_224": (
        64, {"img_size": 64, "patch_size": 2, "window_size": 4, "embed_dim": 32, "depths": (2, 2),
        "num_heads": (2, 4)}),
    "swinv2_tiny_window8_256": (
        64, {"img_size": 64, "window_size": 4, "patch_size": 2, "embed_dim": 32, "depths": (2, 2),
        "num_heads": (2, 4)}),
    "tiny_vit_5m_224": (224, {}),
    "tnt_s_patch16_224": (64, {"img_size": 64, "embed_dim": 96, "depth": LAYERS}),
    "twins_pcpvt_small": (64, {"img_size": 64, "depths": (1, 1, 2, 1)}),
    "twins_svt_small": (64, {"img_size": 64, "depths": (1, 1, 2, 2)}),
    "visformer_tiny": (224, {}),
    "vit_base_patch16_clip_224": (32, VIT),
    "vit_base_patch16_rope_224": (32, VIT),
    "vit_dlittle_patch16_reg1_gap_256": (32, VIT),
    "vit_small_patch14_dinov2": (32, VIT),
    "vit_small_patch16_dinov3": (32, VIT),
    "vit_wee_patch16_reg1_gap_256": (32, VIT),
    "volo.VOLO": (
        64, {"img_size": 64, "layers": (1, 1, 2, 1), "embed_dims": (32, 64, 64, 64), "num_heads": (2, 4, 4,
        4)}),
    "xcit_nano_12_p16_224": (64, {"img_size": 64, "embed_dim": HIDDEN, "depth": LAYERS, "num_heads": 4}),
}
# fmt: on


def timm_sweep() -> tuple[Spec, ...]:
    """Return varied timm models: plain, hierarchical, mixing, convolutional."""
    return tuple(
        _timm(f"timm/{architecture}", architecture, None, image, fields)
        for architecture, (image, fields) in SWEPT.items()
    )
