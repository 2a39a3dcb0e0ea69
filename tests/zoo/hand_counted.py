"""Hugging Face models whose updates were counted by hand, from the modelling code.

A count is one number per stream: the adds that make up its sum. `x + attn` then `x + mlp` is two a
layer; `attn + mlp + x` adds to the stream once; `x + attn + mlp` adds twice, at one read.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn

from tests.zoo import sweep
from tests.zoo.spec import BATCH, HIDDEN, LAYERS, VOCAB, Inputs, Spec, noise, redraw, token_ids

Counts = tuple[int, ...] | str

TOKENS: dict[str, Any] = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DENSE: dict[str, Any] = TOKENS | {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
}
GROUPED = DENSE | {"num_key_value_heads": 2}
UNGROUPED = DENSE | {"num_key_value_heads": 4}
WINDOWED = GROUPED | {"sliding_window": 8, "head_dim": 16}
GEMMA = WINDOWED | {"query_pre_attn_scalar": 16}
GEMMA4 = WINDOWED | {"global_head_dim": 16, "vocab_size_per_layer_input": VOCAB}
MIXTURE = {"num_experts_per_tok": 2, "num_local_experts": 4}
LATENT = UNGROUPED | {
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
FALCON = {k: v for k, v in DENSE.items() if k not in ("intermediate_size", "max_position_embeddings")}
GPT = TOKENS | {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4, "n_positions": 64}
OPT = FALCON | {"word_embed_proj_dim": HIDDEN, "ffn_dim": 96, "max_position_embeddings": 64}
ENCODER_DECODER = TOKENS | {
    "d_model": HIDDEN,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
}
VISION = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
}
DINOV2 = {k: v for k, v in VISION.items() if k != "intermediate_size"} | {
    "mlp_ratio": 2,
    "drop_path_rate": 0.1,
}
WHISPER = {k: v for k, v in ENCODER_DECODER.items() if k != "max_position_embeddings"} | {
    "num_mel_bins": 16,
    "max_source_positions": 20,
    "max_target_positions": 32,
}
MAMBA2 = TOKENS | {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_heads": 8,
    "head_dim": 16,
    "state_size": 16,
    "n_groups": 1,
    "chunk_size": 8,
}
MAMBA = {k: v for k, v in MAMBA2.items() if k in (*TOKENS, "hidden_size", "num_hidden_layers", "state_size")}
# one add per sub-layer, or one for attention and MLP together
SEQUENTIAL, PARALLEL = (2 * LAYERS,), (LAYERS,)
# the decoder has cross-attention besides
SEQ2SEQ = (2 * LAYERS, 3 * LAYERS)


def text() -> Inputs:
    return {"input_ids": token_ids()}


def text_to_text() -> Inputs:
    return text() | {"decoder_input_ids": token_ids(7, seed=2)}


def speech_to_text() -> Inputs:
    return {"input_features": noise(BATCH, 16, 40), "decoder_input_ids": token_ids(7, seed=2)}


def image() -> Inputs:
    return {"pixel_values": noise(BATCH, 3, 32, 32)}


def build(model_class: str, attention: str, fields: dict[str, Any]) -> nn.Module:
    """Build a Hugging Face model from its own configuration class, without a cache."""
    chosen = getattr(transformers, model_class)
    config = sweep.without_cache(chosen.config_class(**fields))
    config._attn_implementation = attention
    torch.manual_seed(0)
    return redraw(chosen(config))


def hf(
    name: str,
    model_class: str,
    expected: Counts,
    shared: dict[str, Any],
    inputs: Callable[[], Inputs] = text,
    attention: str = "eager",
    **fields: Any,
) -> Spec:
    """Describe one model; `fields` are added to the configuration that it shares with others."""
    builder = partial(build, model_class, attention, shared | fields)
    return Spec(name, "transformers", builder, inputs, expected)


def _swept(name: str, model_class: str, expected: Counts) -> Spec:
    """Describe a model whose configuration the sweep's rules make small."""
    inputs = partial(sweep.inputs, model_class, "causal-lm")
    return Spec(name, "transformers", partial(sweep.build, model_class), inputs, expected)


def decoders() -> list[Spec]:
    """Causal language models that a rewrite must handle."""
    # fmt: off
    return [
        hf("gpt2", "GPT2LMHeadModel", SEQUENTIAL, GPT),
        hf("gpt_neo", "GPTNeoForCausalLM", SEQUENTIAL, DENSE, num_layers=LAYERS, num_heads=4,
           attention_types=[[["global", "local"], 1], [["global"], 1]]),
        hf("gpt_bigcode", "GPTBigCodeForCausalLM", SEQUENTIAL, GPT),
        hf("gptj", "GPTJForCausalLM", PARALLEL, GPT, rotary_dim=8),
        hf("codegen", "CodeGenForCausalLM", PARALLEL, GPT, rotary_dim=8),
        hf("gpt_neox_parallel", "GPTNeoXForCausalLM", PARALLEL, DENSE, use_parallel_residual=True),
        hf("gpt_neox", "GPTNeoXForCausalLM", SEQUENTIAL, DENSE, use_parallel_residual=False),
        hf("llama", "LlamaForCausalLM", SEQUENTIAL, GROUPED),
        hf("llama_sdpa", "LlamaForCausalLM", SEQUENTIAL, GROUPED, attention="sdpa"),
        hf("qwen3", "Qwen3ForCausalLM", SEQUENTIAL, GROUPED, head_dim=16),
        hf("qwen3_moe", "Qwen3MoeForCausalLM", SEQUENTIAL, GROUPED, head_dim=16, moe_intermediate_size=32,
           num_experts=4, num_experts_per_tok=2),
        hf("qwen3_next", "Qwen3NextForCausalLM", SEQUENTIAL, GROUPED, head_dim=16, linear_key_head_dim=16,
           linear_value_head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4,
           moe_intermediate_size=32, shared_expert_intermediate_size=32, num_experts=4,
           num_experts_per_tok=2, layer_types=["linear_attention", "linear_attention", "full_attention"]),
        hf("mistral", "MistralForCausalLM", SEQUENTIAL, WINDOWED),
        hf("mixtral", "MixtralForCausalLM", SEQUENTIAL, GROUPED | MIXTURE),
        hf("gemma2", "Gemma2ForCausalLM", SEQUENTIAL, GEMMA),
        hf("gemma3", "Gemma3ForCausalLM", SEQUENTIAL, GEMMA),
        # attention, MLP and the per-layer embedding; the stream is scaled by a buffer in every layer
        hf("gemma4", "Gemma4ForCausalLM", (3 * LAYERS,), GEMMA4, hidden_size_per_layer_input=16),
        hf("gemma4_moe", "Gemma4ForCausalLM", SEQUENTIAL, GEMMA4, hidden_size_per_layer_input=0,
           enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=32),
        hf("phi", "PhiForCausalLM", PARALLEL, DENSE),
        hf("phi3", "Phi3ForCausalLM", SEQUENTIAL, GROUPED),
        hf("persimmon", "PersimmonForCausalLM", SEQUENTIAL, DENSE),
        hf("falcon_parallel", "FalconForCausalLM", PARALLEL, FALCON, parallel_attn=True,
           multi_query=True),
        hf("falcon_new", "FalconForCausalLM", PARALLEL, FALCON, new_decoder_architecture=True,
           num_kv_heads=2),
        hf("falcon_alibi", "FalconForCausalLM", SEQUENTIAL, FALCON, parallel_attn=False, alibi=True,
           multi_query=False),
        hf("cohere", "CohereForCausalLM", SEQUENTIAL, GROUPED),
        hf("cohere2", "Cohere2ForCausalLM", SEQUENTIAL, GROUPED, sliding_window=8),
        # the branch reads the raw stream, and its output is normed
        hf("olmo2", "Olmo2ForCausalLM", SEQUENTIAL, GROUPED),
        hf("olmo3", "Olmo3ForCausalLM", SEQUENTIAL, GROUPED, sliding_window=8),
        hf("exaone4", "Exaone4ForCausalLM", SEQUENTIAL, GROUPED, sliding_window=8,
           sliding_window_pattern=2),
        hf("glm4", "Glm4ForCausalLM", SEQUENTIAL, GROUPED, head_dim=16),
        hf("granite", "GraniteForCausalLM", SEQUENTIAL, GROUPED, residual_multiplier=0.22,
           embedding_multiplier=12.0, attention_multiplier=0.1, logits_scaling=4.0),
        hf("granitemoe", "GraniteMoeForCausalLM", SEQUENTIAL, GROUPED | MIXTURE, residual_multiplier=0.22,
           embedding_multiplier=12.0),
        # the stream is flattened to [tokens, width] and back in every layer
        hf("opt", "OPTForCausalLM", SEQUENTIAL, OPT),
        hf("bloom", "BloomForCausalLM", SEQUENTIAL, TOKENS, hidden_size=HIDDEN, n_layer=LAYERS, n_head=4),
        hf("biogpt", "BioGptForCausalLM", SEQUENTIAL, DENSE),
        hf("xglm", "XGLMForCausalLM", SEQUENTIAL, TOKENS, d_model=HIDDEN, num_layers=LAYERS,
           attention_heads=4, ffn_dim=96, max_position_embeddings=64),
        hf("gpt_oss", "GptOssForCausalLM", SEQUENTIAL, WINDOWED | MIXTURE),
        hf("deepseek_v3", "DeepseekV3ForCausalLM", SEQUENTIAL, LATENT, moe_intermediate_size=32,
           n_routed_experts=8, n_group=2, topk_group=1, num_experts_per_tok=2, first_k_dense_replace=1),
        hf("minicpm3", "MiniCPM3ForCausalLM", SEQUENTIAL, LATENT, dim_model_base=32),
        hf("kimi_linear", "KimiLinearForCausalLM", SEQUENTIAL, LATENT | MIXTURE, q_lora_rank=None,
           moe_intermediate_size=32, linear_head_dim=16, linear_num_heads=4, layer_types=["linear_attention",
           "full_attention", "linear_attention"]),
        hf("nemotron", "NemotronForCausalLM", SEQUENTIAL, GROUPED, head_dim=16),
        hf("stablelm", "StableLmForCausalLM", SEQUENTIAL, GROUPED),
        hf("stablelm_parallel", "StableLmForCausalLM", SEQUENTIAL, GROUPED, use_parallel_residual=True),
        hf("starcoder2", "Starcoder2ForCausalLM", SEQUENTIAL, GROUPED),
        hf("smollm3", "SmolLM3ForCausalLM", SEQUENTIAL, GROUPED),
        hf("nanochat", "NanoChatForCausalLM", SEQUENTIAL, GROUPED),
        hf("mamba", "MambaForCausalLM", PARALLEL, MAMBA),
        hf("mamba2", "Mamba2ForCausalLM", PARALLEL, MAMBA2),
        hf("jamba", "JambaForCausalLM", SEQUENTIAL, GROUPED, num_experts=2, num_experts_per_tok=1,
           expert_layer_period=2, expert_layer_offset=1, attn_layer_period=3, attn_layer_offset=1,
           mamba_d_state=16, mamba_dt_rank=8, use_mamba_kernels=False),
    ]
    # fmt: on


def encoders() -> list[Spec]:
    """Encoders, encoder-decoders and vision models that a rewrite must handle."""
    # fmt: off
    return [
        hf("modernbert", "ModernBertForMaskedLM", SEQUENTIAL, DENSE, cls_token_id=1, sep_token_id=2,
           local_attention=8),
        hf("megatron_bert", "MegatronBertForMaskedLM", SEQUENTIAL, DENSE),
        hf("roberta_prelayernorm", "RobertaPreLayerNormForMaskedLM", SEQUENTIAL, DENSE),
        hf("esm", "EsmForMaskedLM", SEQUENTIAL, DENSE, mask_token_id=96),
        hf("t5", "T5ForConditionalGeneration", SEQ2SEQ, {}, inputs=text_to_text, vocab_size=VOCAB,
           d_model=HIDDEN, d_kv=16, d_ff=96, num_layers=LAYERS, num_decoder_layers=LAYERS, num_heads=4,
           pad_token_id=0, eos_token_id=1, decoder_start_token_id=0),
        hf("mbart", "MBartForConditionalGeneration", SEQ2SEQ, ENCODER_DECODER, inputs=text_to_text),
        hf("pegasus", "PegasusForConditionalGeneration", SEQ2SEQ, ENCODER_DECODER, inputs=text_to_text),
        # no layerdrop: whether a layer runs would depend on a random tensor
        hf("m2m_100", "M2M100ForConditionalGeneration", SEQ2SEQ, ENCODER_DECODER, inputs=text_to_text,
           encoder_layerdrop=0.0, decoder_layerdrop=0.0),
        hf("whisper", "WhisperForConditionalGeneration", SEQ2SEQ, WHISPER, inputs=speech_to_text),
        hf("vit", "ViTForImageClassification", SEQUENTIAL, VISION, inputs=image),
        hf("deit", "DeiTForImageClassification", SEQUENTIAL, VISION, inputs=image),
        hf("dinov2", "Dinov2ForImageClassification", SEQUENTIAL, DINOV2, inputs=image),
        hf("clip_vision", "CLIPVisionModelWithProjection", SEQUENTIAL, VISION, inputs=image,
           projection_dim=32),
    ]
    # fmt: on


def _their_own() -> list[Spec]:
    """Return the model that has Block Attention Residuals in transformers itself, in a release that has it."""
    if not hasattr(transformers, "Inkling2ForCausalLM"):
        return []
    return [_swept("inkling2", "Inkling2ForCausalLM", "AlreadyRewrittenError")]


def refused() -> list[Spec]:
    """Models without one residual stream: each must be refused, and say why."""
    # fmt: off
    return [
        hf("opt_post_norm", "OPTForCausalLM", "PostNormError", OPT, do_layer_norm_before=False),
        hf("bert", "BertForMaskedLM", "PostNormError", DENSE),
        hf("roberta", "RobertaForMaskedLM", "PostNormError", DENSE, pad_token_id=1, bos_token_id=0),
        hf("electra", "ElectraForMaskedLM", "PostNormError", DENSE, embedding_size=HIDDEN),
        hf("albert", "AlbertForMaskedLM", "PostNormError", DENSE, embedding_size=HIDDEN),
        hf("deberta_v2", "DebertaV2ForMaskedLM", "PostNormError", DENSE),
        hf("bart", "BartForConditionalGeneration", "PostNormError", ENCODER_DECODER,
           inputs=text_to_text),
        # hyper-connections: four streams that are mixed before and after every branch
        _swept("deepseek_v4", "DeepseekV4ForCausalLM", "ParallelStreamsError"),
        *_their_own(),
    ]
    # fmt: on
