"""Tiny random models of every causal family of transformers, for benchmarks.models and its test.

    model = tiny_model("qwen3_5_text")
    names = families()

A family's default config is made small by the names of its settings, in all its parts: hidden size
64, two layers or as many as show each kind, 300 tokens, windows, chunks and top-k of 16 tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 300
# Tiny values of settings, by their names in the configs of all families.
SIZES = {
    name: value
    for value, names in {
        VOCABULARY: """
            vocab_size vocab_size_per_layer_input
        """,
        64: """
            hidden_size d_model n_embd n_embed embed_dim dim attention_hidden_size
            word_embed_proj_dim embedding_size input_embedding_size
            output_embedding_size lru_width conv_dim hidden_size_global
        """,
        128: """
            n_inner d_inner mamba_d_ssm
        """,
        96: """
            intermediate_size intermediate_size_mlp ffn_dim ffn_hidden_size dff
            decoder_ffn_dim encoder_ffn_dim d_ff
        """,
        32: """
            moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size
            q_lora_rank kv_lora_rank mamba_d_head mamba_head_dim mamba_headdim
            index_n_heads
        """,
        2: """
            num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers
            num_decoder_layers num_encoder_layers num_key_value_heads num_kv_heads
            swa_num_key_value_heads num_global_key_value_heads
            linear_num_key_heads num_experts_per_tok moe_k moe_topk top_k_experts
            num_experts_per_token zero_expert_num
        """,
        4: """
            num_attention_heads n_head n_heads num_heads decoder_attention_heads
            encoder_attention_heads num_decoder_attention_heads
            num_encoder_attention_heads swa_num_attention_heads linear_num_value_heads
            num_experts num_local_experts n_routed_experts moe_num_experts mamba_n_heads
            mamba_num_heads time_step_rank mamba_dt_rank
        """,
        16: """
            head_dim kv_channels global_head_dim swa_head_dim v_head_dim swa_v_head_dim
            qk_nope_head_dim index_head_dim index_topk linear_key_head_dim
            linear_value_head_dim sliding_window sliding_window_size
            attention_window_size attention_chunk_size keep_window_size window_size
            local_window mamba_d_state mamba_chunk_size ssm_state_size state_size
            chunk_size hidden_size_per_layer_input
        """,
        8: """
            qk_rope_head_dim rotary_dim
        """,
        24: """
            qk_head_dim
        """,
        1: """
            n_group num_group topk_group n_shared_experts first_k_dense_replace num_shared_experts
            moe_num_shared_experts num_dense_layers mamba_n_groups n_groups
            mamba_ngroups
        """,
        256: """
            max_position_embeddings n_positions max_seq_len n_ctx
        """,
    }.items()
    for name in names.split()
}
# What a family wants besides, by its model_type; None leaves a setting at its default.
HEADS = {"head_dim": 16}
EXTRA: dict[str, dict[str, Any]] = {
    "hunyuan_v1_dense": HEADS, "hunyuan_v1_moe": HEADS, "ministral": HEADS, 
    "nemotron": HEADS | {"num_key_value_heads": 2},
    "qwen4_exp_text": HEADS | {
        "num_key_value_heads": 2, "num_attention_heads": 4, "indexer_n_heads": 2,
        "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "bamba": {"attn_layer_indices": [1], "layer_types": None},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "layer_types": None},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "recurrent_gemma": {"num_hidden_layers": 3, "layer_types": None},
    "bailing_hybrid": {"num_expert_group": 1},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 96, "hidden_size": 64, "moe_top_k": 2},
    },
    "dots3_note_vision_encoder": {"per_layer_config": {}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mamba2": {"num_heads": 4, "head_dim": 32},
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "num_buckets": 4},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "moshi": {"audio_vocab_size": 32},
    "zaya": {"num_experts_per_tok": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "zamba": {
        "layers_block_type": ["mamba", "hybrid", "hybrid"], "num_hidden_layers": 3,
        "attention_hidden_size": 128, "attention_head_dim": 32,
    },
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "mamba_headdim": 16,
               "attention_hidden_size": 128, "attention_head_dim": 32},
    "xmod": {"default_language": "en_XX"},
    "deepseek_v2": {"num_experts_per_tok": 2},
}  # fmt: skip
NEEDED: dict[str, dict[str, Any]] = {"moshi": {"audio_vocab_size": 32}}
# Settings of published checkpoints that a family's default does not have.
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
YARN |= {"original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2 with a window": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}),
    "mixtral with a window": ("mixtral", {"sliding_window": 16}),
    "phi3 with a window": ("phi3", {"sliding_window": 16}),
    "phimoe with a window": ("phimoe", {"sliding_window": 16}),
    "starcoder2 with a window": ("starcoder2", {"sliding_window": 16}),
    "ministral3 with a window": ("ministral3", {"sliding_window": 16}),
    "granite, published scales": (
        "granite",
        {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22},
    ),
    "granitemoe, logits / 8": ("granitemoe", {"logits_scaling": 8.0}),
    "gemma2 without caps": (
        "gemma2",
        {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma2, tight caps": (
        "gemma2",
        {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3, capped": (
        "gemma3_text",
        {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 5.0},
    ),
    "gemma4, capped": ("gemma4_text", {"final_logit_softcapping": 5.0}),
    "gemma4 as a whole, capped": ("gemma4", {"final_logit_softcapping": 5.0}),
    "gemma3 as an encoder": ("gemma3_text", {"use_bidirectional_attention": True}),
    "llama, yarn": ("llama", {"rope_parameters": YARN}),
    "llama, llama3 positions": ("llama", {"rope_parameters": LLAMA3}),
    "llama, biases, tied": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "phi3, partial rotary": ("phi3", {"partial_rotary_factor": 0.5}),
    "mixtral, router logits": ("mixtral", {"output_router_logits": True}),
    "qwen3_moe, router logits": ("qwen3_moe", {"output_router_logits": True}),
    "olmoe, router logits": ("olmoe", {"output_router_logits": True}),
    "bert as an encoder": ("bert", {"is_decoder": False}),
    "roberta as an encoder": ("roberta", {"is_decoder": False}),
    "falcon, ALiBi": ("falcon", {"alibi": True}),
    "falcon_h1, multiplied logits": ("falcon_h1", {"lm_head_multiplier": 0.25}),
    "llama, attention dropout": ("llama", {"attention_dropout": 0.5}),
    "opt, post-norm": ("opt", {"do_layer_norm_before": False}),
    "gpt2, scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "deepseek_v3, top-k of all": ("deepseek_v3", {"n_group": 2, "topk_group": 1}),
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}


def families() -> list[str]:
    """Return the names of all causal families, as configs write them in model_type."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(family: str, **changes: Any) -> PreTrainedConfig:
    """Return the family's default config made small; changes go to the part that has them."""
    return CONFIG_MAPPING[family](**_small(CONFIG_MAPPING[family], family, changes))


def _small(kind: type[PreTrainedConfig], family: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Arguments that make a config of this kind small, those of its parts included."""
    default = kind(**NEEDED.get(family, {}))
    names = vars(default)
    found = {n: value for n, value in SIZES.items() if names.get(n) is not None}
    found |= {n: value for n, value in TOKENS.items() if n in names}
    found |= {n: True for n in ("is_decoder",) if n in names}
    for name, part in kind.sub_configs.items():
        if isinstance(names.get(name), PreTrainedConfig):  # AutoConfig says nothing of its kind
            part = type(names[name])
            found[name] = _small(part, part.model_type, changes)
            if name == "text_config":
                found[name]["model_type"] = part.model_type
    if "qk_rope_head_dim" in names:  # the head size is that of the rotated part there
        found["head_dim"] = SIZES["qk_rope_head_dim"]
        found["num_key_value_heads"] = SIZES["num_attention_heads"]
    kinds = names.get("layer_types")
    if kinds and "layer_types" not in changes:
        kinds = list(dict.fromkeys(kinds))  # one layer of each kind, two at least
        found["layer_types"] = kinds * (1 if len(kinds) > 1 else 2)
        found["num_hidden_layers"] = len(found["layer_types"])
    found |= {n: v for n, v in EXTRA.get(family, {}).items() if v is not None}
    found |= {n: v for n, v in changes.items() if n in names}
    return {n: v for n, v in found.items() if EXTRA.get(family, {}).get(n, 0) is not None}


def tiny_model(family: str, *, seed: int = 0, **changes: Any) -> nn.Module:
    """Return a random model whose weights are large enough that a leak shows."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **changes), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.ndim >= 2:
            weight.data.normal_(0, 0.15, generator=generator)
        elif name.endswith("sinks"):
            weight.data.normal_(0, 1.0, generator=generator)
    return model.eval()
