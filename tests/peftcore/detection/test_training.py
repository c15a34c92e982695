"""LoRA with default targets gets a gradient at every layer it adapts, in models of every kind."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_models import tiny
from torch import Tensor

from peftcore import LoraConfig, get_peft_model

TEXT = (
    "albert bamba bart bert bloom codegen cpmant ctrl deberta deberta-v2 deepseek_v3 distilbert electra "
    "embedding_gemma2 falcon falcon_h1 falcon_mamba fnet gemma2 gemma3_text gemma4_text gpt2 gpt_bigcode gpt_neo "
    "gpt_neox gpt_oss gptj granitemoehybrid jamba jetmoe kimi_linear lfm2 llama mamba marian minimax mistral mixtral "
    "mobilebert modernbert mpt mt5 nemotron_h olmo2 openai-gpt opt phi phi3 qwen2_moe qwen3 qwen3_5_text qwen3_next "
    "recurrent_gemma roberta-prelayernorm rwkv squeezebert stablelm switch_transformers t5 xlm xlnet zamba"
)
IMAGES = "beit clip_vision_model convnext data2vec-vision deit dinov2 hgnet_v2 ijepa pvt_v2 resnet segformer vit"
SOUND = "hubert sew unispeech wav2vec2 wavlm whisper"
PAIRS = "clip siglip"


EVERY = f"{TEXT} {IMAGES} {SOUND} {PAIRS}".split()


def inputs(model: Any, model_type: str) -> dict[str, Tensor]:
    config = model.config
    tokens = {"input_ids": torch.arange(10, 18)[None]}
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", 32)
    pixels = {"pixel_values": torch.randn(2, 3, *([size, size] if isinstance(size, int) else [64, 64]))}
    if model_type in PAIRS.split():
        return {"input_ids": tokens["input_ids"].expand(2, -1), **pixels}
    if model_type in IMAGES.split():
        return pixels
    if model_type == "whisper":
        sound = torch.randn(1, config.num_mel_bins, 2 * config.max_source_positions)
        return {"input_features": sound, "decoder_input_ids": tokens["input_ids"]}
    if model_type in SOUND.split():
        return {"input_values": torch.randn(1, 6400)}
    return {**tokens, **({"decoder_input_ids": tokens["input_ids"]} if config.is_encoder_decoder else {})}


def floats(output: object) -> Iterator[Tensor]:
    """Every tensor of an output that gradients can start from."""
    if isinstance(output, Tensor):
        if output.requires_grad:
            yield output
    elif isinstance(output, dict | tuple | list):
        for part in output.values() if isinstance(output, dict) else output:
            yield from floats(part)


@pytest.mark.parametrize("model_type", EVERY)
@pytest.mark.filterwarnings("ignore::UserWarning")  # some models warn of their own slow paths
def test_every_adapted_layer_gets_a_gradient(model_type: str) -> None:
    torch.manual_seed(0)
    rank = 4 if model_type == "squeezebert" else 2  # its layers have 4 groups
    model = get_peft_model(tiny(model_type, "cpu"), LoraConfig(r=rank))
    model.train()
    sum(part.float().pow(2).sum() for part in floats(dict(model(**inputs(model, model_type))))).backward()
    second = {name: weight for name, weight in model.named_parameters() if "lora_B" in name}
    assert second
    without = [name for name, weight in second.items() if weight.grad is None or not weight.grad.any()]
    assert without == ["fnet.pooler.dense.lora_B.default.weight"] * (model_type == "fnet")  # masked LM pools nothing


def test_types_of_every_kind_train() -> None:
    assert len(set(EVERY)) > 80
