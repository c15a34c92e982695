"""Any model type that transformers knows, built tiny from its own configuration class."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto as auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

_ORDER = (
    *("IMAGE_TEXT_TO_TEXT", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "MASKED_LM", "CAUSAL_LM", "CTC"),
    *("", "IMAGE_CLASSIFICATION", "OBJECT_DETECTION", "SEMANTIC_SEGMENTATION", "DEPTH_ESTIMATION"),
    *("KEYPOINT_DETECTION", "KEYPOINT_MATCHING", "IMAGE_MATTING", "POSE_ESTIMATION", "UNIVERSAL_SEGMENTATION"),
    *("TEXT_TO_WAVEFORM", "TEXT_TO_SPECTROGRAM", "RNNT", "TABLE_RECOGNITION", "TEXT_RECOGNITION", "RETRIEVAL"),
)
MAPPINGS = [getattr(auto, f"MODEL_FOR_{task}_MAPPING" if task else "MODEL_MAPPING") for task in _ORDER]
"""The first that knows a type gives its class."""
TYPES = {
    name
    for task in _ORDER
    for name in getattr(auto, f"MODEL_FOR_{task}_MAPPING_NAMES" if task else "MODEL_MAPPING_NAMES")
}
"""Every type that one of MAPPINGS names; no configuration is imported for it."""

_KEYS = {
    "hidden": "hidden_size d_model n_embd dim model_dim emb_dim embed_dim embedding_size word_embed_proj_dim "
    "decoder_hidden_size encoder_hidden_size cross_attention_hidden_size text_embed_dim lru_width",
    "inner": "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff n_inner ffn_hidden_size mlp_hidden_size "
    "ffn_intermediate_size inner_dim d_inner encoder_intermediate_size",
    "expert": "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size",
    "layers": "num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers num_encoder_layers "
    "num_decoder_layers depth num_blocks",
    "heads": "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
    "num_encoder_attention_heads num_decoder_attention_heads num_experts num_local_experts n_routed_experts",
    "head": "head_dim d_kv kv_channels attention_head_dim qk_rope_head_dim qk_nope_head_dim qk_head_dim v_head_dim",
    "rotary": "rotary_dim",
    "rank": "kv_lora_rank q_lora_rank",
    "chosen": "num_experts_per_tok moe_topk top_k_experts moe_k num_experts_per_token",
    "vocabulary": "vocab_size",
    "image": "image_size",
    "patch": "patch_size",
    "little": "hidden_size_per_layer_input",
    "bottleneck": "true_hidden_size intra_bottleneck_size",
}
_NAMES = {key: size for size, keys in _KEYS.items() for key in keys.split()}

TEXT = {
    **{"hidden": 32, "inner": 80, "expert": 24, "layers": 2, "heads": 4, "head": 16, "vocabulary": 128},
    **{"image": 32, "patch": 8, "little": 8, "bottleneck": 16, "rank": 24, "chosen": 2, "rotary": 8},
}
TOWER = TEXT | {"hidden": 64, "inner": 192}
"""Towers inside a model of several, of another width than its text so that a mix-up shows."""

_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
_HEAD = {"head_dim": 16}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2}
_SHARED_KV = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": 128,
}
OVERRIDES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe", "hunyuan_vl_text", "ministral"), _HEAD),
    "bailing_hybrid": _HYBRID,
    "bamba": {"attn_layer_indices": [1], **_MAMBA},
    "esm": {"vocab_size": 33, "mask_token_id": 32, "pad_token_id": 1},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64},
    "gemma3n_text": _SHARED_KV | {"laurel_rank": 4, "activation_sparsity_pattern": None},
    "gemma4_text": _SHARED_KV,
    "glm5_next_text": {"layer_types": ["linear_attention", "indexed_attention"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], **_MAMBA},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "num_experts": 4},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "minimax": _HYBRID,
    "nemotron": _HEAD | {"num_key_value_heads": 2},
    "olmo_hybrid": _HYBRID,
    "qwen3_5": {"text_config": _HYBRID},
    "qwen3_5_text": _HYBRID,
    "qwen3_next": _HYBRID,
    "siglip": {"vision_config": {"hidden_size": 32}},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "wav2vec2-bert": {"vocab_size": 128},
    "wav2vec2-conformer": {"vocab_size": 128},
    "zamba": {"num_hidden_layers": 4, "layer_types": ["mamba", "hybrid"] * 2},
    "zamba2": {"num_hidden_layers": 4, "layer_types": ["mamba", "hybrid"] * 2},
}
"""Options without which a type cannot be built, or is too small to have all its kinds of layers."""


def tiny(model_type: str, device: str = "meta", **options: Any) -> nn.Module:
    """A model of this type with the first auto class of MAPPINGS that knows it.

    Sizes of the configuration (nested ones too) are shrunk by name; where its own checks refuse that, all towers get
    one width, then only the numbers of layers are shrunk, so such a model is fit for the meta device only.
    """
    whole = CONFIG_MAPPING[model_type]()
    options = {**OVERRIDES.get(model_type, {}), **options}
    model_class = next((mapping[type(whole)] for mapping in MAPPINGS if type(whole) in mapping), None)
    if model_class is None:
        raise LookupError(f"{model_type}: no auto class")
    model_class = model_class[0] if isinstance(model_class, tuple) else model_class
    refusals: list[Exception] = []
    for tower, sizes in ((TOWER, TEXT), (TEXT, TEXT), ({"layers": 2}, {"layers": 2}), ({}, {})):
        try:
            with torch.device(device):
                return model_class(_shrunk(whole, sizes, tower, options))
        except Exception as refusal:  # whatever a configuration's or a model's own checks raise
            refusals.append(refusal)
    raise refusals[0]


def _shrunk(config: PreTrainedConfig, sizes: dict[str, int], tower: dict[str, int], options: dict[str, Any]) -> Any:
    values: dict[str, Any] = {}
    for key, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            inner = sizes if "text" in key or "decoder" in key or "language" in key else tower
            values[key] = _shrunk(value, inner, tower, options.get(key, {}))
        elif isinstance(value, int) and not isinstance(value, bool) and value and not key.startswith("_"):
            if _NAMES.get(key) in sizes:
                values[key] = min(value, sizes[_NAMES[key]])
            elif key == "num_key_value_heads" and "heads" in sizes:
                values[key] = 2 if value < (getattr(config, "num_attention_heads", None) or value) else 4
            elif key.endswith("_token_id") and "vocabulary" in sizes and value >= sizes["vocabulary"]:
                values[key] = sum(map(ord, key)) % 100 + 5
    return type(config)(**{**values, **{key: value for key, value in options.items() if not isinstance(value, dict)}})
