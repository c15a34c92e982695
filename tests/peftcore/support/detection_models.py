"""Tiny models on the meta device, with the architecture that detection should find in each."""

import torch
import transformers
from torch import nn
from transformers import AutoConfig

from peftcore.detection import Architecture

LLAMA = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
BERT = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GPT2 = {"vocab_size": 320, "n_embd": 64, "n_layer": 2, "n_head": 4}
T5 = {"vocab_size": 320, "d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 2, "num_heads": 4}
OPT = {**BERT, "ffn_dim": 128, "word_embed_proj_dim": 64}
DISTILBERT = {"vocab_size": 320, "dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4}
MOE = {**LLAMA, "moe_intermediate_size": 32, "num_experts": 4, "shared_expert_intermediate_size": 96}
WHISPER = {
    "vocab_size": 320,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
}
PHI = {**LLAMA, "num_key_value_heads": 4, "pad_token_id": 0}

CAUSAL, MASKED, SEQ2SEQ = "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForSeq2SeqLM"


def build(family: str, auto_class: str, device: str = "meta", **sizes: object) -> nn.Module:
    config = AutoConfig.for_model(family, **sizes)
    with torch.device(device):
        return getattr(transformers, auto_class).from_config(config)


def roles(architecture: Architecture) -> dict[str, str]:
    return {name: info.role for name, info in architecture.target_modules.items() if info.role != "embedding"}


LLAMA_ROLES = {
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "o_proj": "output",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "lm_head": "head",
}
BERT_ROLES = {
    "query": "query",
    "key": "key",
    "value": "value",
    "attention.output.dense": "output",
    "intermediate.dense": "up",
    "layer.*.output.dense": "down",
}
NEOX_ROLES = {
    "query_key_value": "fused_qkv",
    "dense": "output",
    "dense_h_to_4h": "up",
    "dense_4h_to_h": "down",
}
FC_ROLES = {"fc1": "up", "fc2": "down"}
QKVO_ROLES = {"q_proj": "query", "k_proj": "key", "v_proj": "value"}

CASES = {
    "gpt2": (
        CAUSAL,
        GPT2,
        "causal decoder",
        {
            "c_attn": "fused_qkv",
            "attn.c_proj": "output",
            "c_fc": "up",
            "mlp.c_proj": "down",
            "lm_head": "head",
        },
    ),
    "llama": (CAUSAL, LLAMA, "causal decoder", LLAMA_ROLES),
    "mistral": (CAUSAL, LLAMA, "causal decoder", LLAMA_ROLES),
    "qwen2": (CAUSAL, LLAMA, "causal decoder", LLAMA_ROLES),
    "qwen3": (CAUSAL, {**LLAMA, "head_dim": 32}, "causal decoder", LLAMA_ROLES),
    "gemma": (CAUSAL, {**LLAMA, "head_dim": 32}, "causal decoder", LLAMA_ROLES),
    "gemma2": (CAUSAL, {**LLAMA, "head_dim": 32}, "causal decoder", LLAMA_ROLES),
    "phi": (
        CAUSAL,
        PHI,
        "causal decoder",
        {**QKVO_ROLES, "dense": "output", **FC_ROLES, "lm_head": "head"},
    ),
    "phi3": (
        CAUSAL,
        PHI,
        "causal decoder",
        {
            "qkv_proj": "fused_qkv",
            "o_proj": "output",
            "gate_up_proj": "fused_gate_up",
            "down_proj": "down",
            "lm_head": "head",
        },
    ),
    "gpt_neox": (CAUSAL, BERT, "causal decoder", {**NEOX_ROLES, "lm_head": "head"}),
    "bloom": (CAUSAL, GPT2 | {"hidden_size": 64}, "causal decoder", {**NEOX_ROLES, "lm_head": "head"}),
    # one key and value head: the fused projection is q + 2 kv, not 3 times its input
    "falcon": (CAUSAL, BERT, "causal decoder", {**NEOX_ROLES, "lm_head": "head"}),
    "opt": (
        CAUSAL,
        OPT,
        "causal decoder",
        {**QKVO_ROLES, "out_proj": "output", **FC_ROLES, "lm_head": "head"},
    ),
    "mixtral": (
        CAUSAL,
        {**LLAMA, "num_local_experts": 4},
        "causal decoder",
        {**QKVO_ROLES, "o_proj": "output", "lm_head": "head"},
    ),
    "qwen2_moe": (CAUSAL, MOE, "causal decoder", {**LLAMA_ROLES, "shared_expert_gate": "router"}),
    "bert": (
        MASKED,
        BERT,
        "encoder",
        {**BERT_ROLES, "transform.dense": "unknown", "decoder": "head"},
    ),
    "roberta": (
        "AutoModelForSequenceClassification",
        BERT,
        "encoder",
        {**BERT_ROLES, "classifier.dense": "head", "out_proj": "head"},
    ),
    "distilbert": (
        MASKED,
        DISTILBERT,
        "encoder",
        {
            "q_lin": "query",
            "k_lin": "key",
            "v_lin": "value",
            "out_lin": "output",
            "lin1": "up",
            "lin2": "down",
            "vocab_transform": "unknown",
            "vocab_projector": "head",
        },
    ),
    "vit": (
        "AutoModelForImageClassification",
        {**BERT, "image_size": 32, "patch_size": 16},
        "vision encoder",
        {
            **QKVO_ROLES,
            "o_proj": "output",
            **FC_ROLES,
            "projection": "convolution",
            "classifier": "head",
        },
    ),
    "t5": (
        SEQ2SEQ,
        T5,
        "encoder-decoder",
        {
            "q": "query",
            "k": "key",
            "v": "value",
            "o": "output",
            "wi": "up",
            "wo": "down",
            "lm_head": "head",
        },
    ),
    "whisper": (
        "AutoModelForSpeechSeq2Seq",
        WHISPER,
        "encoder-decoder",
        {
            **QKVO_ROLES,
            "out_proj": "output",
            **FC_ROLES,
            "conv1": "convolution",
            "conv2": "convolution",
            "proj_out": "head",
        },
    ),
    "mamba": (
        CAUSAL,
        {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8},
        "causal decoder",
        {
            "in_proj": "mixer",
            "x_proj": "mixer",
            "out_proj": "mixer",
            "lm_head": "head",
        },
    ),
}
