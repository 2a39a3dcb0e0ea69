"""Denoisers of diffusers, their updates counted by hand. diffusers is imported only to build."""

from functools import partial
from typing import Any

import torch
from torch import nn

from tests.zoo.spec import BATCH, LAYERS, Inputs, Spec, noise, redraw

HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16}
LATENTS: dict[str, Any] = {"in_channels": 4, "out_channels": 4}
WIDTH, TEXT_WIDTH, TEXT = 32, 24, 5


def build(model_class: str, fields: dict[str, Any]) -> nn.Module:
    """Build a model of diffusers with random weights."""
    import diffusers

    torch.manual_seed(0)
    return redraw(getattr(diffusers, model_class)(**fields))


def _steps() -> torch.Tensor:
    return torch.tensor([1, 2])


def _fractions() -> torch.Tensor:
    """Make the steps of models that multiply them by 1000; larger ones drown float32 in the sines of the embedding."""
    return _steps() / 1000


def _with_text(*latents: int, text: tuple[int, int] = (TEXT, TEXT_WIDTH), **others: Any) -> Inputs:
    return {
        "hidden_states": noise(BATCH, *latents),
        "encoder_hidden_states": noise(BATCH, *text, seed=2),
        "timestep": _steps(),
        "return_dict": False,
        **others,
    }


def _places(tokens: int, axes: int) -> torch.Tensor:
    return torch.arange(tokens)[:, None].expand(tokens, axes).float()


def _diffusers(
    name: str, model_class: str, expected: tuple[int, ...] | str, fields: dict[str, Any], **inputs: Any
) -> Spec:
    return Spec(
        f"diffusers_{name}", "diffusers", partial(build, model_class, fields), partial(dict, **inputs), expected
    )


def image_denoisers() -> list[Spec]:
    """Denoisers of images: one stream that reads the text, or image and text side by side."""
    grid = (4, 8, 8)
    patches = {"sample_size": 8, "patch_size": 2}
    return [
        _diffusers(
            "dit",
            "DiTTransformer2DModel",
            (2 * LAYERS,),
            HEADS | patches | {"in_channels": 4, "num_layers": LAYERS, "num_embeds_ada_norm": 10, "norm_num_groups": 4},
            hidden_states=noise(BATCH, *grid),
            timestep=_steps(),
            class_labels=_steps(),
            return_dict=False,
        ),
        # attention to itself, to the text, and a network
        _diffusers(
            "pixart",
            "PixArtTransformer2DModel",
            (3 * LAYERS,),
            HEADS
            | patches
            | {"in_channels": 4, "out_channels": 8, "num_layers": LAYERS, "cross_attention_dim": WIDTH}
            | {"caption_channels": TEXT_WIDTH, "norm_num_groups": 4, "use_additional_conditions": False},
            **_with_text(*grid, added_cond_kwargs={"resolution": None, "aspect_ratio": None}),
        ),
        _diffusers(
            "sana",
            "SanaTransformer2DModel",
            (3 * LAYERS,),
            HEADS
            | LATENTS
            | {"num_layers": LAYERS, "num_cross_attention_heads": 2, "cross_attention_head_dim": 16}
            | {"cross_attention_dim": WIDTH, "caption_channels": TEXT_WIDTH, "sample_size": 8, "patch_size": 1}
            | {"mlp_ratio": 2.0},
            **_with_text(*grid),
        ),
        # the last layer does not write to the text
        _diffusers(
            "sd3",
            "SD3Transformer2DModel",
            (2 * LAYERS, 2 * LAYERS - 2),
            HEADS
            | LATENTS
            | patches
            | {"num_layers": LAYERS, "joint_attention_dim": TEXT_WIDTH, "caption_projection_dim": WIDTH}
            | {"pooled_projection_dim": TEXT_WIDTH, "pos_embed_max_size": 8},
            **_with_text(*grid, pooled_projections=noise(BATCH, TEXT_WIDTH, seed=3)),
        ),
        # two layers of image beside text, then three of both in one stream, an update each
        _diffusers(
            "flux",
            "FluxTransformer2DModel",
            (4, 4, 3),
            HEADS
            | {"patch_size": 1, "in_channels": 4, "num_layers": 2, "num_single_layers": 3}
            | {"joint_attention_dim": TEXT_WIDTH, "pooled_projection_dim": TEXT_WIDTH, "axes_dims_rope": (4, 4, 8)},
            **_with_text(
                16,
                4,
                timestep=_fractions(),
                pooled_projections=noise(BATCH, TEXT_WIDTH, seed=3),
                img_ids=_places(16, 3),
                txt_ids=_places(5, 3),
            ),
        ),
        _diffusers(
            "flux2",
            "Flux2Transformer2DModel",
            (4, 4, 3),
            HEADS
            | {"patch_size": 1, "in_channels": 4, "num_layers": 2, "num_single_layers": 3}
            | {"joint_attention_dim": WIDTH, "timestep_guidance_channels": WIDTH, "axes_dims_rope": (4, 4, 4, 4)},
            **_with_text(
                16,
                4,
                text=(TEXT, WIDTH),
                timestep=_fractions(),
                img_ids=_places(16, 4).expand(BATCH, 16, 4),
                txt_ids=_places(5, 4).expand(BATCH, 5, 4),
                guidance=_fractions(),
            ),
        ),
        # what the last layer writes to the text is thrown away
        _diffusers(
            "qwen_image",
            "QwenImageTransformer2DModel",
            (2 * LAYERS, 2 * LAYERS - 2),
            HEADS
            | {"patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": LAYERS}
            | {"joint_attention_dim": TEXT_WIDTH, "axes_dims_rope": (8, 4, 4)},
            **_with_text(
                16,
                16,
                timestep=_fractions(),
                encoder_hidden_states_mask=torch.ones(BATCH, TEXT, dtype=torch.bool),
                img_shapes=[(1, 4, 4)] * BATCH,
            ),
        ),
        # two attentions and a network a layer; the last of four begins with a long skip from the first
        _diffusers(
            "hunyuan_dit",
            "HunyuanDiT2DModel",
            (9, 3),
            HEADS
            | patches
            | {"in_channels": 4, "hidden_size": WIDTH, "num_layers": 4, "mlp_ratio": 2.0, "text_len": 4}
            | {"cross_attention_dim": TEXT_WIDTH, "cross_attention_dim_t5": TEXT_WIDTH, "text_len_t5": 4}
            | {"pooled_projection_dim": 16, "activation_fn": "gelu-approximate"},
            **_with_text(
                *grid,
                text=(4, TEXT_WIDTH),
                text_embedding_mask=torch.ones(BATCH, 4),
                encoder_hidden_states_t5=noise(BATCH, 4, TEXT_WIDTH, seed=3),
                text_embedding_mask_t5=torch.ones(BATCH, 4),
                image_meta_size=noise(BATCH, 6, seed=4),
                timestep=torch.tensor([1.0, 2.0]),
                style=torch.zeros(BATCH, dtype=torch.long),
                image_rotary_emb=[noise(16, 16, seed=5), noise(16, 16, seed=6)],
            ),
        ),
        # the transformer of the last block down, and the middle's between two of convolutions; their layers lie inside
        _diffusers(
            "unet",
            "UNet2DConditionModel",
            (4,),
            LATENTS
            | {"block_out_channels": (16, 32), "norm_num_groups": 8, "layers_per_block": 1, "sample_size": 8}
            | {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "cross_attention_dim": TEXT_WIDTH}
            | {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 8},
            sample=noise(BATCH, *grid),
            **{name: value for name, value in _with_text(*grid).items() if name != "hidden_states"},
        ),
        _diffusers(
            "cogview4",
            "CogView4Transformer2DModel",
            (2 * LAYERS, 2 * LAYERS - 2),
            LATENTS
            | {"patch_size": 2, "num_layers": LAYERS, "attention_head_dim": 8, "num_attention_heads": 4}
            | {"text_embed_dim": TEXT_WIDTH, "time_embed_dim": 8, "condition_dim": 4},
            **_with_text(
                *grid,
                original_size=torch.tensor([[8, 8]] * BATCH),
                target_size=torch.tensor([[8, 8]] * BATCH),
                crop_coords=torch.zeros(BATCH, 2, dtype=torch.long),
            ),
        ),
        _diffusers(
            "chroma",
            "ChromaTransformer2DModel",
            (4, 4, 3),
            HEADS
            | {"patch_size": 1, "in_channels": 4, "num_layers": 2, "num_single_layers": 3, "approximator_layers": 1}
            | {"joint_attention_dim": WIDTH, "axes_dims_rope": (4, 4, 8), "approximator_num_channels": 8}
            | {"approximator_hidden_dim": 16},
            **_with_text(
                16,
                4,
                text=(TEXT, WIDTH),
                timestep=_fractions(),
                img_ids=_places(16, 3),
                txt_ids=_places(5, 3),
            ),
        ),
        # the forward cuts captions at the lengths that their masks hold
        _diffusers(
            "lumina2",
            "Lumina2Transformer2DModel",
            "GraphBreakError",
            {"sample_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 48, "num_layers": LAYERS}
            | {"num_refiner_layers": 1, "num_attention_heads": 3, "num_kv_heads": 1, "multiple_of": 2}
            | {"axes_dim_rope": (4, 6, 6), "axes_lens": (32, 32, 32), "cap_feat_dim": TEXT_WIDTH},
            **_with_text(*grid, encoder_attention_mask=torch.ones(BATCH, TEXT, dtype=torch.bool)),
        ),
        _diffusers(
            "prior",
            "PriorTransformer",
            (2 * LAYERS,),
            HEADS | {"num_layers": LAYERS, "embedding_dim": 8, "num_embeddings": 7, "additional_embeddings": 4},
            hidden_states=noise(BATCH, 8),
            timestep=_steps(),
            proj_embedding=noise(BATCH, 8, seed=2),
            encoder_hidden_states=noise(BATCH, 7, 8, seed=3),
            return_dict=False,
        ),
    ]


def video_and_audio_denoisers() -> list[Spec]:
    """Denoisers of videos and of sound."""
    video = (4, 2, 8, 8)
    return [
        # the text is first; what the last network writes to it is thrown away
        _diffusers(
            "cogvideox",
            "CogVideoXTransformer3DModel",
            (2 * LAYERS - 1, 2 * LAYERS),
            HEADS
            | LATENTS
            | {"time_embed_dim": 8, "text_embed_dim": TEXT_WIDTH, "num_layers": LAYERS, "sample_width": 8}
            | {"sample_height": 8, "sample_frames": 5, "patch_size": 2, "temporal_compression_ratio": 4}
            | {"max_text_seq_length": 6},
            **_with_text(2, 4, 8, 8, text=(6, TEXT_WIDTH)),
        ),
        _diffusers(
            "wan",
            "WanTransformer3DModel",
            (3 * LAYERS,),
            HEADS
            | LATENTS
            | {"patch_size": (1, 2, 2), "attention_head_dim": 12, "text_dim": TEXT_WIDTH, "freq_dim": WIDTH}
            | {"ffn_dim": 32, "num_layers": LAYERS, "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads"}
            | {"rope_max_seq_len": 32},
            **_with_text(*video),
        ),
        _diffusers(
            "ltx",
            "LTXVideoTransformer3DModel",
            (3 * LAYERS,),
            HEADS | LATENTS | {"cross_attention_dim": WIDTH, "num_layers": LAYERS, "caption_channels": TEXT_WIDTH},
            **_with_text(8, 4, encoder_attention_mask=torch.ones(BATCH, TEXT), num_frames=2, height=2, width=2),
        ),
        # the text is first, and the last layer does not write to it
        _diffusers(
            "mochi",
            "MochiTransformer3DModel",
            (2 * LAYERS - 2, 2 * LAYERS),
            HEADS
            | {"patch_size": 2, "num_layers": LAYERS, "pooled_projection_dim": 16, "in_channels": 4}
            | {"text_embed_dim": TEXT_WIDTH, "time_embed_dim": 4, "max_sequence_length": 16},
            **_with_text(*video, text=(16, TEXT_WIDTH), encoder_attention_mask=torch.ones(BATCH, 16, dtype=torch.bool)),
        ),
        # a layer over space, then one over time, each attention to itself and a network; over space to the text, too
        _diffusers(
            "latte",
            "LatteTransformer3DModel",
            (10,),
            {"num_attention_heads": 4, "attention_head_dim": 8, "sample_size": 8, "num_layers": 2, "patch_size": 2}
            | {"caption_channels": TEXT_WIDTH, "in_channels": 4, "out_channels": 8, "cross_attention_dim": WIDTH}
            | {"attention_bias": True, "activation_fn": "gelu-approximate", "num_embeds_ada_norm": 100}
            | {"norm_type": "ada_norm_single", "norm_elementwise_affine": False},
            **_with_text(4, 1, 8, 8, enable_temporal_attentions=True),
        ),
        # the text goes through one layer more, before the others; the last two layers hold both, an update each
        _diffusers(
            "hunyuan_video",
            "HunyuanVideoTransformer3DModel",
            (2 * LAYERS, 2 + 2 * LAYERS, 2),
            HEADS
            | LATENTS
            | {"attention_head_dim": 10, "num_layers": LAYERS, "num_single_layers": 2, "num_refiner_layers": 1}
            | {"patch_size": 1, "patch_size_t": 1, "guidance_embeds": True, "text_embed_dim": TEXT_WIDTH}
            | {"pooled_projection_dim": 8, "rope_axes_dim": (2, 4, 4)},
            **_with_text(
                4,
                1,
                4,
                4,
                encoder_attention_mask=torch.ones(BATCH, TEXT),
                pooled_projections=noise(BATCH, 8, seed=3),
                guidance=torch.ones(BATCH),
            ),
        ),
        # the text has a layer of its own; a layer of the video is two attentions and a network
        _diffusers(
            "kandinsky5",
            "Kandinsky5Transformer3DModel",
            (2, 3 * LAYERS),
            {"in_visual_dim": 4, "in_text_dim": TEXT_WIDTH, "in_text_dim2": 13, "time_dim": 16, "out_visual_dim": 4}
            | {"patch_size": (1, 2, 2), "model_dim": WIDTH, "ff_dim": 64, "num_text_blocks": 1}
            | {"num_visual_blocks": LAYERS, "axes_dims": (2, 2, 4), "visual_cond": False},
            **_with_text(
                1,
                8,
                8,
                4,
                pooled_projections=noise(BATCH, 13, seed=3),
                visual_rope_pos=[torch.arange(1), torch.arange(4), torch.arange(4)],
                text_rope_pos=torch.arange(TEXT),
            ),
        ),
        _diffusers(
            "stable_audio",
            "StableAudioDiTModel",
            (3 * LAYERS,),
            LATENTS
            | {"num_attention_heads": 2, "attention_head_dim": 8, "num_key_value_attention_heads": 2, "sample_size": 4}
            | {"num_layers": LAYERS, "cross_attention_dim": 8, "time_proj_dim": 8, "global_states_input_dim": 8}
            | {"cross_attention_input_dim": 8},
            **_with_text(4, 8, text=(TEXT, 8), global_hidden_states=noise(BATCH, 1, 8, seed=3)),
        ),
    ]
