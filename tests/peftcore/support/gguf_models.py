"""Tiny random models of each family in transformers, their GGUF files, and llama.cpp to read those.

The GGUF is written here, not by the code under test, by llama.cpp's own conventions.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import gguf
import pytest
import torch
from gguf.quants import quantize
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from peftcore import (
    LoraConfig,
    PeftConfig,
    get_peft_model,
)

VOCABULARY = 64
CONTEXT = 64
PROMPTS = ([5], [7, 3, 11], [2, 60, 33, 9, 14, 14, 20], list(range(1, 31)))

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "phi3": {},
    "gemma": {"head_dim": 8, "initializer_range": 0.1, "tie_word_embeddings": True},
    "gemma2": {
        "head_dim": 8,
        "initializer_range": 0.1,
        "query_pre_attn_scalar": 8,
        "sliding_window": CONTEXT,
        "tie_word_embeddings": True,
    },
    "gpt2": {"n_inner": 48, "initializer_range": 0.1, "tie_word_embeddings": True},
}


def tiny(family: str, **options: Any) -> PreTrainedModel:
    """A random model whose next token depends on all that it has read."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**_SIZES, **FAMILIES[family], **options})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, mean=float(name.endswith("weight") and "gemma" not in family), std=0.1)
    return model


def _rows(weight: Tensor, heads: int) -> Tensor:
    """Llama's q or k as llama.cpp keeps it: the two halves of each head interleaved."""
    half = len(weight) // heads // 2
    order = [h * 2 * half + k * half + j for h in range(heads) for j in range(half) for k in (0, 1)]
    return weight[order]


def _in_gguf(model: Any, name: str, tensor: Tensor) -> Tensor:
    config, family = model.config, model.config.model_type
    layer = name.split(".")[-2]
    if family in ("llama", "mistral") and layer in ("q_proj", "k_proj"):
        return _rows(tensor, config.num_attention_heads if layer == "q_proj" else config.num_key_value_heads)
    if family == "gpt2" and layer.startswith("c_") and name.endswith("weight"):
        return tensor.T
    return tensor + 1 if "gemma" in family and "norm" in name else tensor


def write_gguf(model: Any, path: Path, tokens: list[str] | None = None, kind: str = "F32", ends: bool = True) -> Path:
    """The model as llama.cpp's converter would write it, its matrices in the type `kind`.

    ends: also embeddings and output head; False: those in float32.
    """
    config, family = model.config, model.config.model_type
    architecture = {"mistral": "llama"}.get(family, family)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.n_inner if family == "gpt2" else config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    tokens = tokens or [f"t{number}" for number in range(VOCABULARY)]
    writer.add_vocab_size(len(tokens))
    if family == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        heads = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_rope_dimension_count(heads)
        writer.add_key_length(heads)
        writer.add_value_length(heads)
    if family == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
        writer.add_sliding_window(config.sliding_window)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
    writer.add_token_merges(["t 1"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(
        next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), config.num_hidden_layers
    )
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = _in_gguf(model, name, tensor).contiguous().numpy()
        is_end = "embed" in name or "lm_head" in name
        stored = gguf.GGMLQuantizationType[kind if values.ndim == 2 and (ends or not is_end) else "F32"]
        writer.add_tensor(str(names.get_name(name, (".weight", ".bias"))), quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class LlamaCpp:
    """Real llama.cpp with a model and adapters, on one thread, its cache in float32."""

    def __init__(self, base: Path, *adapters: Path) -> None:
        xllamacpp: Any = pytest.importorskip("xllamacpp")
        options = xllamacpp.CommonParams()
        options.model.path = str(base)
        options.n_ctx, options.n_parallel, options.n_gpu_layers = 2 * CONTEXT, 1, 0
        options.warmup = options.fit_params = False
        options.verbosity = -1
        options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
        options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        options.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        options.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0) for adapter in adapters]
        self.server = xllamacpp.Server(options)

    def log_probs(self, prompt: Sequence[int], scale: float | None = None, vocabulary: int = VOCABULARY) -> Tensor:
        """Log-probabilities (v,) of the token after a prompt; scale: of the first adapter, None as it was loaded."""
        request = {"prompt": list(prompt), "n_predict": 1, "n_probs": vocabulary, "cache_prompt": False}
        if scale is not None:
            request["lora"] = [{"id": 0, "scale": scale}]
        answer = self.server.handle_completions({**request, "temperature": -1})
        found = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        values = {entry["id"]: entry["logprob"] for entry in found}
        return torch.tensor([values[token] for token in range(vocabulary)])

    def tokens(self, text: str) -> list[int]:
        """A text's tokens, with those that the model's own settings put before it."""
        body = json.dumps({"content": text, "add_special": True}).encode()
        request = Request(f"{self.server.listening_address}/tokenize", body, {"Content-Type": "application/json"})
        with urlopen(request, timeout=60) as answer:
            return json.load(answer)["tokens"]


@torch.no_grad()
def log_probs(model: Any, prompt: Sequence[int]) -> Tensor:
    """The same by transformers."""
    return model(torch.tensor([list(prompt)])).logits[0, -1].float().log_softmax(-1)


def furthest(one: Callable[[Sequence[int]], Tensor], other: Callable[[Sequence[int]], Tensor]) -> float:
    """The largest difference of two models' log-probabilities over the prompts."""
    return max(float((one(prompt) - other(prompt)).abs().max()) for prompt in PROMPTS)


DOWN = r"down_proj|mlp\.c_proj"


def adapted(family: str, config: PeftConfig | None = None, **options: Any) -> Any:
    """A tiny model with a random adapter that changes what it says."""
    model = tiny(family, **options)
    torch.manual_seed(1)
    config = config or LoraConfig(
        r=4,
        lora_alpha=7,
        use_rslora=True,
        target_modules="all-linear",
        rank_pattern={DOWN: 2},
        alpha_pattern={DOWN: 3},
        init_lora_weights=False,
    )
    model = get_peft_model(model, config).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model
