"""Shrink any Hugging Face configuration: three layers, width 64, every kind of layer kept.

A field is recognised by its name, from the union of the names that the library's configurations use.
Fields with no rule keep their default, so a new architecture usually builds without a change here.
"""

from typing import Any

from transformers import PreTrainedConfig

LAYERS = 3
VOCAB = 128

# what a count or a width is called, by what it counts
_NAMES = {
    "layers": """num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers
        num_encoder_layers num_decoder_layers num_blocks num_transformer_layers speech_encoder_layers
        t2u_encoder_layers t2u_decoder_layers num_layers_per_stack""",
    "width": """hidden_size d_model n_embd dim embed_dim emb_dim model_dim embedding_size audio_hidden_size
        word_embed_proj_dim lru_width d_latents decoder_hidden_size entity_emb_size pooler_hidden_size
        pooler_output_size encoder_hidden_size output_dim out_hidden_size prediction_head_size""",
    "inner width": """intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff d_inner dff dim_ff
        n_inner ffn_hidden_size decoder_intermediate_size speech_encoder_intermediate_size t2u_encoder_ffn_dim
        t2u_decoder_ffn_dim intermediate_size_mlp dense_intermediate_size""",
    "expert width": """moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size
        moe_shared_expert_intermediate_size expert_ffn_hidden_size shared_experts_intermediate_size""",
    "heads": """num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads
        attention_heads num_self_attention_heads num_cross_attention_heads speech_encoder_attention_heads
        t2u_encoder_attention_heads t2u_decoder_attention_heads decoder_num_attention_heads
        linear_num_value_heads linear_num_heads""",
    "key-value heads": """num_key_value_heads num_kv_heads linear_num_key_heads num_query_groups
        swa_num_key_value_heads""",
    "head width": """head_dim d_kv d_head dim_head v_head_dim qk_nope_head_dim linear_key_head_dim kv_channels
        linear_head_dim linear_value_head_dim attention_head_dim global_head_dim""",
    "experts": "num_experts num_local_experts n_routed_experts moe_num_experts",
    "active experts": "num_experts_per_tok num_experts_per_token moe_k moe_topk top_k_experts",
    "positions": """max_position_embeddings n_positions n_ctx max_source_positions max_target_positions
        max_encoder_position_embeddings max_decoder_position_embeddings max_seq_len context_length
        t2u_max_position_embeddings""",
    "window": "sliding_window local_attention attention_window_size attention_chunk_size",
    "vocabulary": "vocab_size src_vocab_size tgt_vocab_size entity_vocab_size vocab_size_per_layer_input",
}
_SIZES = {
    "layers": LAYERS,
    "width": 64,
    "inner width": 96,
    "expert width": 32,
    "heads": 4,
    "key-value heads": 2,
    "head width": 16,
    "experts": 8,
    "active experts": 2,
    "positions": 64,
    "window": 8,
    "vocabulary": VOCAB,
}
_GROUPS = {group: tuple(names.split()) for group, names in _NAMES.items()}

_TINY = {name: _SIZES[group] for group, names in _GROUPS.items() for name in names} | {
    "hidden_size_per_layer_input": 16,
    "n_group": 2,
    "topk_group": 1,
    "num_expert_group": 2,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "o_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 24,
    "rotary_dim": 8,
    "image_size": 32,
    "patch_size": 8,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
    "num_mtp_layers": 0,
    "state_size": 16,
    "ssm_state_size": 16,
    "mamba_d_state": 16,
    "chunk_size": 8,
    "mamba_chunk_size": 8,
    "time_step_rank": 8,
    "query_pre_attn_scalar": 16,
    "index_head_dim": 16,
    "index_n_heads": 4,
    "index_topk": 8,
    "max_window_layers": 1,
}


# sizes whose default may be smaller than the tiny one, for a reason
_AT_MOST = ("n_group", "topk_group", "num_expert_group", "first_k_dense_replace")


def tiny_config(config_class: type[PreTrainedConfig], overrides: dict[str, Any]) -> PreTrainedConfig:
    """Build a small `config_class`. Overrides win over the rules; those of a nested one are a dict."""
    return config_class(**tiny_fields(config_class(), overrides))


def tiny_fields(default: PreTrainedConfig, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the fields of a default configuration that have a rule, at their tiny size."""
    overrides = overrides or {}
    given = {name: value for name, value in vars(default).items() if not name.startswith("_")}
    nested = {name: value for name, value in given.items() if isinstance(value, PreTrainedConfig)}
    fields = {name: type(value)(**tiny_fields(value, overrides.get(name))) for name, value in nested.items()}
    chosen = {name: value for name, value in overrides.items() if name not in nested}
    return fields | _plain(given) | _heads(given) | _pyramid(given) | _token_ids(given) | chosen


def _plain(given: dict[str, Any]) -> dict[str, Any]:
    counts = [given[name] for name in _GROUPS["layers"] if _is_count(given.get(name))]
    depth = max(counts, default=0)
    fields: dict[str, Any] = {}
    for name, value in given.items():
        if name in _TINY and _is_count(value):
            fields[name] = min(value, _TINY[name]) if name in _AT_MOST else _TINY[name]
        elif isinstance(value, list) and len(value) == depth > LAYERS:
            fields[name] = sample(value)
    return fields


def _heads(given: dict[str, Any]) -> dict[str, Any]:
    """Keep the relation of key-value heads to heads that the default has."""
    heads = next((given[name] for name in _GROUPS["heads"] if _is_count(given.get(name))), None)
    shared = [name for name in _GROUPS["key-value heads"] if name in given]
    # latent attention: every head has its own keys, and head_dim is the width of their rotary part
    latent = given.get("kv_lora_rank") is not None
    fields = {name: 4 for name in shared if latent or given[name] in (heads, None)}
    return fields | ({"head_dim": 8 if latent else 16} if "head_dim" in given else {})


def _pyramid(given: dict[str, Any]) -> dict[str, Any]:
    """Shrink vision networks of several stages: two layers a stage, an image that survives the strides."""
    depths, heads = given.get("depths"), given.get("num_heads")
    if not isinstance(depths, (list, tuple)):
        return {}
    fields: dict[str, Any] = {"depths": [min(layers, 2) for layers in depths]}
    kept = {name: given[name] for name in ("patch_size", "hidden_size", "mlp_ratio") if name in given}
    if "image_size" in given:
        fields["image_size"] = 64 if _is_count(given["image_size"]) else [64, 64]
    if "window_size" in given:
        fields["window_size"] = 2
    if isinstance(heads, (list, tuple)) and _is_count(given.get("embed_dim")):
        fields["embed_dim"] = 8 * heads[0]
        kept.pop("hidden_size", None)
    return fields | kept


def sample(per_layer: list[Any]) -> list[Any]:
    """Choose LAYERS entries of a list that has one per layer, every kind first.

    ["a", "a", "a", "b"] -> ["a", "b", "a"]
    """
    kinds = [value for index, value in enumerate(per_layer) if value not in per_layer[:index]]
    return (kinds + per_layer)[:LAYERS]


def _token_ids(config: dict[str, Any]) -> dict[str, Any]:
    """Keep every special token inside the small vocabulary, and apart from the ids that tests feed."""
    plain = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    named = [name for name in config if name.endswith(("_token_id", "_token_index"))]
    given = [name for name in named if config[name] is not None or name in plain]
    others = [name for name in given if name not in plain]
    spread = {name: VOCAB - 1 - index for index, name in enumerate(others)}
    return {name: plain[name] for name in given if name in plain} | spread


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
