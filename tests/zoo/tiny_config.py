"""Shrink any Hugging Face configuration: three layers, width 64, every kind of layer kept.

A field is recognised by its name, from the union of the names that the library's configurations use.
Fields with no rule keep their default, so a new architecture usually builds without a change here.
"""

from typing import Any

from transformers import PreTrainedConfig

LAYERS = 3
VOCAB = 128

_LAYER_COUNTS = frozenset(
    """num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers
    num_decoder_layers num_blocks num_transformer_layers speech_encoder_layers t2u_encoder_layers
    t2u_decoder_layers num_layers_per_stack n_layers_local_encoder""".split()
)

_WIDTHS = """hidden_size d_model n_embd dim embed_dim emb_dim model_dim embedding_size audio_hidden_size
    word_embed_proj_dim lru_width d_latents decoder_hidden_size entity_emb_size pooler_hidden_size
    pooler_output_size encoder_hidden_size output_dim out_hidden_size prediction_head_size""".split()
_INNER_WIDTHS = """intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff d_inner dff dim_ff
    ffn_hidden_size n_inner decoder_intermediate_size speech_encoder_intermediate_size t2u_encoder_ffn_dim
    t2u_decoder_ffn_dim intermediate_size_mlp dense_intermediate_size""".split()
_EXPERT_WIDTHS = """moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size
    shared_intermediate_size expert_ffn_hidden_size shared_experts_intermediate_size""".split()
_HEADS = """num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads
    attention_heads num_self_attention_heads num_cross_attention_heads speech_encoder_attention_heads
    t2u_encoder_attention_heads t2u_decoder_attention_heads decoder_num_attention_heads
    linear_num_value_heads linear_num_heads""".split()
_KV_HEADS = """num_key_value_heads num_kv_heads linear_num_key_heads num_query_groups
    swa_num_key_value_heads""".split()
_HEAD_DIMS = """head_dim d_kv d_head dim_head v_head_dim qk_nope_head_dim linear_key_head_dim linear_head_dim
    linear_value_head_dim attention_head_dim global_head_dim kv_channels""".split()
_EXPERTS = "num_experts num_local_experts n_routed_experts moe_num_experts".split()
_ACTIVE_EXPERTS = "num_experts_per_tok num_experts_per_token moe_k moe_topk top_k_experts".split()
_POSITIONS = """max_position_embeddings n_positions n_ctx max_source_positions max_target_positions
    max_encoder_position_embeddings max_decoder_position_embeddings max_seq_len context_length
    t2u_max_position_embeddings""".split()
_WINDOWS = "sliding_window local_attention attention_window_size attention_chunk_size".split()


def _table() -> dict[str, int]:
    groups = (
        (_LAYER_COUNTS, LAYERS), (_WIDTHS, 64), (_INNER_WIDTHS, 96), (_EXPERT_WIDTHS, 32), (_HEADS, 4),
        (_KV_HEADS, 2), (_HEAD_DIMS, 16), (_EXPERTS, 8), (_ACTIVE_EXPERTS, 2), (_POSITIONS, 64), (_WINDOWS, 8),
    )  # fmt: skip
    return {name: size for names, size in groups for name in names}


_TINY = _table() | {
    "vocab_size": VOCAB,
    "src_vocab_size": VOCAB,
    "tgt_vocab_size": VOCAB,
    "entity_vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB,
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
    depth = max((value for name, value in given.items() if name in _LAYER_COUNTS and _is_count(value)), default=0)
    fields = {name: _tiny_value(name, value, depth) for name, value in given.items()}
    fields |= {
        name: type(value)(**tiny_fields(value, overrides.get(name)))
        for name, value in given.items()
        if isinstance(value, PreTrainedConfig)
    }
    fields = {name: value for name, value in fields.items() if value is not None}
    nested = {name for name, value in given.items() if isinstance(value, PreTrainedConfig)}
    chosen = {name: value for name, value in overrides.items() if name not in nested}
    return fields | _heads(given) | _pyramid(given) | _token_ids(default) | chosen


def _tiny_value(name: str, value: Any, depth: int) -> Any:
    if name in _TINY and _is_count(value):
        return min(value, _TINY[name]) if name in _AT_MOST else _TINY[name]
    if isinstance(value, list) and len(value) == depth > LAYERS:
        return sample(value)
    return None


def _heads(given: dict[str, Any]) -> dict[str, Any]:
    """Keep the relation of key-value heads to heads that the default has."""
    heads = next((given[name] for name in _HEADS if _is_count(given.get(name))), None)
    fields = {name: 4 for name in _KV_HEADS if name in given and given[name] in (heads, None)}
    if given.get("kv_lora_rank") is not None:  # latent attention: only the rotary part has a head_dim
        return fields | {name: 4 for name in _KV_HEADS if name in given} | ({"head_dim": 8} if "head_dim" in given else {})
    return fields | ({"head_dim": 16} if "head_dim" in given else {})


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


def _token_ids(default: PreTrainedConfig) -> dict[str, Any]:
    """Keep every special token inside the small vocabulary, and apart from the ids that tests feed."""
    plain = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    named = [name for name in vars(default) if name.endswith(("_token_id", "_token_index"))]
    given = [name for name in named if vars(default)[name] is not None or name in plain]
    others = [name for name in given if name not in plain]
    spread = {name: VOCAB - 1 - index for index, name in enumerate(others)}
    return {name: plain[name] for name in given if name in plain} | spread


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
