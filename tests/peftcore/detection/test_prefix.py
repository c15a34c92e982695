"""Prefix geometry against the caches that models fill, and against what HF PEFT makes of the configuration."""

import pytest
import torch
from peft import PrefixTuningConfig
from peft.utils.other import _prepare_prompt_learning_config
from tiny_models import tiny
from transformers.cache_utils import DynamicCache

from peftcore.detection import detect

TYPES = (
    "bamba bart biogpt bloom codegen cohere2 cpmant ctrl deepseek_v3 deepseek_v32 deepseek_v4 falcon gemma gemma2 "
    "gemma3_text gemma3n_text gemma4_text glm4_moe_lite gpt2 gpt_bigcode gpt_neo gpt_neox gptj gpt_oss "
    "granitemoehybrid hrm_text jamba jetmoe kimi_linear lfm2 llama llama4_text marian mbart minicpm3 minimax mistral "
    "mixtral mpt mt5 nemotron_h olmo2 opt persimmon phi phi3 pegasus qwen2 qwen2_moe qwen3 qwen3_5_text qwen3_next "
    "recurrent_gemma stablelm starcoder2 t5 trocr xglm zamba"
)


@pytest.mark.parametrize("model_type", TYPES.split())
def test_geometry_is_that_of_the_filled_cache(model_type: str) -> None:
    model = tiny(model_type, "cpu").eval()
    found = detect(model).prefix
    assert found is not None
    tokens = torch.arange(10, 16)[None]
    decoder = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        if model_type == "recurrent_gemma":  # fills a cache, but returns none
            model(input_ids=tokens, cache=(cache := DynamicCache(config=model.config)))
        else:
            cache = model(input_ids=tokens, use_cache=True, **decoder).cache
    filled = [shape_of(layer) for layer in getattr(cache, "self_attention_cache", cache).layers]
    ours = [layer and (layer.kv_heads, layer.head_dim, layer.value_dim) for layer in found.layers]
    assert filled == ours[: len(filled)]  # layers that share an earlier one's have no slot where they are the last
    assert found.num_layers == len(ours)
    assert set(ours[len(filled) :]) <= {None}
    assert max(layer.kv_heads * layer.head_dim for layer in found.layers if layer) == found.kv_dim


def shape_of(layer: object) -> tuple[int, int, int] | None:
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if not isinstance(keys, torch.Tensor) or not isinstance(values, torch.Tensor):
        return None
    return keys.shape[1], keys.shape[3], values.shape[3]


NOT_LIKE_PEFT = {
    "deepseek_v3 deepseek_v32 glm4_moe_lite minicpm3": "the cache of latent attention has no head_dim of that size",
    "deepseek_v4": "its cache has one head",
    "bart marian mbart pegasus": "PEFT counts the encoder's layers",
    "cpmant": "PEFT divides the width by the heads; the family has a head size of its own",
    "falcon gpt_bigcode": "one kv head; PEFT repeats for every query head",
    "hrm_text": "PEFT counts a block once that every token goes through twice",
    "jetmoe mt5 t5 zamba": "PEFT divides the width by the heads; the family has a head size of its own",
    "kimi_linear": "its full attention is latent, of one head; PEFT reads the number of query heads",
    "mpt trocr xglm": "PEFT finds no number of heads under the family's own name for it and refuses",
}


@pytest.mark.parametrize("model_type", [t for t in TYPES.split() if t not in " ".join(NOT_LIKE_PEFT).split()])
def test_geometry_is_what_peft_takes_from_the_configuration(model_type: str) -> None:
    model = tiny(model_type)
    found = detect(model).prefix
    assert found is not None
    theirs = _prepare_prompt_learning_config(PrefixTuningConfig(num_virtual_tokens=3), model.config)
    assert (theirs.num_layers, theirs.num_attention_heads) == (found.num_layers, found.num_kv_heads)
    assert theirs.token_dim == found.kv_dim


def test_shared_and_absent_layers_are_told_apart() -> None:
    gemma = detect(tiny("gemma3n_text")).prefix
    assert gemma is not None and gemma.shared == (2, 3) and not gemma.uniform
    assert [layer is None for layer in gemma.layers] == [False, False, True, True]
    jamba = detect(tiny("jamba")).prefix
    assert jamba is not None and jamba.shared == () and jamba.layers[0] is None


def test_layers_of_several_widths() -> None:
    found = detect(tiny("gemma4_text")).prefix
    assert found is not None
    assert [layer and layer.head_dim for layer in found.layers] == [16, 512, None, None]
    assert (found.head_dim, found.token_dim) == (512, 32)


@pytest.mark.parametrize("model_type", ["mamba", "rwkv", "xlnet", "vit", "wav2vec2", "openai-gpt"])
def test_a_model_that_takes_no_keys_and_values_has_no_geometry(model_type: str) -> None:
    assert detect(tiny(model_type)).prefix is None
