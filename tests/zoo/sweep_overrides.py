"""What the rules of tiny_config and sweep do not know of single models."""

from collections.abc import Callable
from typing import Any

import torch

from tests.zoo.spec import BATCH, Inputs, noise, token_ids

# model type or class -> fields whose sizes hang together; a dict is for a nested configuration
OVERRIDES: dict[str, dict[str, Any]] = {
    "blt": {
        "encoder_hash_byte_group_vocab": 50,
        "max_patch_length": 8,
        "decoder_config": {"hidden_size_global": 64},
        "encoder_config": {"hidden_size_global": 64},
    },
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}}
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "max_window_layers": 3},
    "efficientnet": {"width_coefficient": 0.5, "depth_coefficient": 0.5, "hidden_dim": 640, "image_size": 64},
    "esm": {"vocab_size": 128, "mask_token_id": 127},
    "esmc": {"num_key_value_heads": 4},
    # the vision tower is a timm model, which text alone does not run
    "gemma3n": {"text_config": {"num_kv_shared_layers": 0}, "vision_config": {"architecture": "resnet10t"}},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "granite_speech": {"encoder_config": {"hidden_dim": 64, "dim_head": 16}},
    "granite_speech_plus": {"encoder_config": {"hidden_dim": 64, "dim_head": 16}},
    "led": {"attention_window": 8},
    "levit": {"image_size": 224},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "longformer": {"attention_window": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    # equal widths would leave a parameter without elements
    "mobilebert": {"embedding_size": 32},
    "mobilevitv2": {"image_size": 256},
    # heads must divide the channels of Fourier features (261) and of convolved ones (322)
    "perceiver": {"num_cross_attention_heads": 1, "num_latents": 16, "num_self_attends_per_block": 3},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "ngram_vocab_size_base": 200,
    },
    "reformer": {"axial_pos_shape": [8, 8], "axial_pos_embds_dim": [32, 32]},
    "ReformerModelWithLMHead": {"is_decoder": True},
    "ReformerForMaskedLM": {"is_decoder": False},
    "roc_bert": {"shape_vocab_size": 128, "pronunciation_vocab_size": 128},
    "shieldgemma2": {"yes_token_index": 3, "no_token_index": 4},
    "vibevoice_asr": {
        "acoustic_tokenizer_encoder_config": {"num_filters": 4, "depths": [1] * 7},
        "semantic_tokenizer_encoder_config": {"num_filters": 4, "depths": [1] * 7},
    },
    "xmod": {"default_language": "en_XX"},
    # the library ties the later shared blocks to the first, and wants a later one
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}


def _naflex_patches() -> Inputs:
    return {
        "pixel_values": noise(BATCH, 16, 3 * 8 * 8),
        "pixel_attention_mask": torch.ones(BATCH, 16, dtype=torch.int64),
        "spatial_shapes": torch.full((BATCH, 2), 4),
    }


def _speech_and_text() -> Inputs:
    # eight frames for each token
    return {"input_ids": token_ids(16, 90), "input_features": noise(BATCH, 128, 8 * 16)}


def _with_masks() -> Inputs:
    ids, decoder_ids = token_ids(16, 90), token_ids(12, 90)
    masks = {"attention_mask": torch.ones_like(ids), "decoder_attention_mask": torch.ones_like(decoder_ids)}
    return {"input_ids": ids, "decoder_input_ids": decoder_ids, "use_cache": False, **masks}


# class -> inputs of a kind that its main input's name does not tell
SPECIAL_INPUTS: dict[str, Callable[[], Inputs]] = {
    # without a mask it takes the shape of None while exporting
    "LongT5ForConditionalGeneration": _with_masks,
    "Siglip2ForImageClassification": _naflex_patches,
    "VoxtralRealtimeForConditionalGeneration": _speech_and_text,
}
