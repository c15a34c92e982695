"""Every model type of transformers that can be built tiny, on the meta device: what `detect` says against the model.

The quick tests ask it of the types in PEFT's tables, `make slow` of all others.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS
from tiny_models import TYPES as NAMED
from tiny_models import tiny
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from peftcore.bases import is_adaptable
from peftcore.detection import Architecture, detect
from peftcore.detection.roles import FEED_FORWARD

NOT_BUILT = {
    "needs timm": "conditional_detr dab-detr deformable_detr detr edgetam edgetam_vision_model fast_vlm gemma3n "
    "gemma3n_vision omdet-turbo pe_audio_video pe_audio_video_encoder pe_video pe_video_encoder perception_lm "
    "table-transformer timm_backbone timm_wrapper",
    "needs natten": "dinat",
    "needs torchaudio": "higgs_audio_v2_tokenizer",
    "needs detectron2": "layoutlmv2",
    "its own configuration class builds no model without further arguments": "autoformer chameleon cohere_compass "
    "cohere_compass_text dbrx deepseek_ocr2 diffusion_gemma dots1 emu3 gemma4_assistant granite4_vision hunyuan_vl "
    "informer moonshine_streaming musicgen musicgen_melody nemotron_h_omni nougat pp_ocrv5_server_det "
    "pp_ocrv6_medium_det qwen3_omni_moe t5gemma2_encoder time_series_transformer upernet vitmatte",
    "its class is not in its module": "voxtral_realtime_text",
    "no auto class knows its configuration's class": "evolla",
    "sizes of its towers hang together in a way of their own": "d_fine depth_pro fun_asr_nano inkling2_loop lw_detr",
}
"""{reason: types}. Beside them only those that no auto class knows: parts of other types, which are built with them."""

NO_ATTENTION = {
    "a convolutional network": "bit efficientnet encodec glm_image_vqmodel hgnet_v2 mobilenet_v1 mobilenet_v2 "
    "pp_lcnet pp_ocrv5_mobile_det pp_ocrv5_mobile_rec pp_ocrv5_server_rec pp_ocrv6_small_det pp_ocrv6_small_rec "
    "pp_ocrv6_tiny_rec regnet resnet slanet superpoint textnet univnet uvdoc wavtokenizer wavtokenizer_encoder",
    "a convolutional network with MLPs": "convnext convnextv2 dac dinov3_convnext muse_spark_audio "
    "vibevoice_acoustic_tokenizer vibevoice_acoustic_tokenizer_decoder vibevoice_acoustic_tokenizer_encoder",
    "mixes by convolution, pooling, Fourier transform or an MLP": "fnet focalnet patchtsmixer poolformer "
    "lfm3_vl lfm3_vl_vision",
    "a state space model": "falcon_mamba mamba mamba2",
    "attends with convolutions over the image": "mobilevitv2 sam3_lite_text_text_model",
    "has queries and keys, no values": "swiftformer",
    "hands the weights of its projections to one function and calls none": "wavlm",
    "has queries only and is handed the keys and values of another model": "gemma4_unified_assistant",
    "keeps its projections in layers or parameters of its own, which no adapter reaches": "ibert xlnet",
}
NO_FEED_FORWARD = {
    "a convolutional network": NO_ATTENTION["a convolutional network"],
    "a state space model, whose block is the mixer": NO_ATTENTION["a state space model"],
    "its MLPs are convolutions": "fastspeech2_conformer fastspeech2_conformer_with_hifigan mobilevitv2 poolformer "
    "sam3_lite_text_text_model swiftformer vits",
    "its MLP has a norm between narrowing and widening": "superglue",
    "see NO_ATTENTION": "ibert",
}
NOT_PACKABLE = {
    "keeps a state": "bailing_hybrid bamba deepseek_v4 falcon_h1 falcon_mamba glm5_next glm5_next_text "
    "granitemoehybrid jamba kimi_linear lara_mini mamba mamba2 minicpm_ocr minicpmv4_6 minicpmv4_7 minimax "
    "nemo_speechlm nemotron_h olmo_hybrid qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_next qwen4_exp "
    "qwen4_exp_text recurrent_gemma rwkv xlstm zamba zamba2 zaya",
    "convolves over time": "convbert inkling2 inkling2_loop_text inkling2_text inkling_mm_model inkling_text lfm2 "
    "lfm2_moe lfm3 lfm3_vl",
    "attends to windows, hashes or a low rank": "big_bird funnel longformer mra nystromformer reformer yoso",
    "mixes without attention": "fnet",
    "has attention that is not seen": "ibert xlnet",
}
OTHER_WIDTHS = {
    **dict.fromkeys(("nemotron3_5_asr", "nemotron_asr_streaming", "parakeet_rnnt", "parakeet_tdt"), 64),  # encoder's
    **dict.fromkeys(("edgetam_video", "sam2", "sam2_hiera_det_model", "sam2_video", "sam2_vision_model"), 384),
    **dict.fromkeys(("sam3_tracker_video", "sam3_video"), 256),  # the memory's, its largest list of blocks
    "perceiver": 1280,  # d_latents: d_model is the input's
    "vibevoice_acoustic_tokenizer": 2048,  # grows from stage to stage
    "vibevoice_acoustic_tokenizer_decoder": 2048,
    "vibevoice_acoustic_tokenizer_encoder": 2048,
    "vjepa2": 384,  # the predictor's, which stays whole in the tiny model
    "wavtokenizer": 768,
    "wavtokenizer_encoder": 32,
}
"""Widths where the configuration gives another one or none."""

TYPES = sorted(NAMED & set(CONFIG_MAPPING_NAMES) - {name for names in NOT_BUILT.values() for name in names.split()})


def listed(table: dict[str, str]) -> set[str]:
    return {name for names in table.values() for name in names.split()}


def reached(model: nn.Module, regex: str) -> list[nn.Module]:
    return [module for path, module in model.named_modules() if re.fullmatch(regex, path)]


def test_nearly_every_type_is_built() -> None:
    assert len(TYPES) > 580


# -- what is asked of each ---------------------------------------------------------------------------------------------


def attention_and_feed_forward_are_found(model_type: str, model: Any, found: Architecture) -> None:
    roles = {info.role for info in (*found.target_modules.values(), *found.experts.values())}
    attends = bool(roles & {"query", "fused_qkv"}) and bool(roles & {"value", "fused_kv", "fused_qkv"})
    assert attends == (model_type not in listed(NO_ATTENTION))
    feeds = "down" in roles and bool(roles & {"up", "fused_gate_up"})
    assert feeds == (model_type not in listed(NO_FEED_FORWARD))


def defaults_are_layers_that_can_be_adapted(model_type: str, model: Any, found: Architecture) -> None:
    for name in {name for method in ("LORA", "ADALORA", "IA3", "VERA", "OSF") for name in defaults(found, method)}:
        check_layers(model, found, name, found.target_modules[name].count)
    norms = found.targets_for("LN_TUNING")
    assert norms or not any(is_norm(module) for module in model.modules())
    for name in norms:
        check_layers(model, found, name, found.norms[name].count)


def defaults(found: Architecture, method: str) -> Sequence[str]:
    names = found.targets_for(method)
    assert names, method
    return names


def check_layers(model: Any, found: Architecture, name: str, count: int) -> None:
    layers = [layer for layer in reached(model, found.target_regex([name])) if is_adaptable(layer)]
    assert len(layers) >= count > 0, name  # a module in two places is counted once


def is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Norm") and is_adaptable(module)


def ia3_scales_what_it_adapts(model_type: str, model: Any, found: Architecture) -> None:
    assert set(found.feedforward_modules) <= set(found.targets_for("IA3"))
    assert {found.target_modules[name].role for name in found.feedforward_modules} <= {"down"}
    assert set(found.feed_forward) == {n for n in found.all_linear if found.target_modules[n].role in FEED_FORWARD}


def widths(config: PreTrainedConfig) -> Iterator[int]:
    """Every width that a configuration or one in it names."""
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from widths(value)
    for own in named_widths(config):  # a pyramid doubles it from stage to stage
        yield from (own * 2**stage for stage in range(4))
    for key in ("hidden_sizes", "embed_dims", "embed_dim"):
        if isinstance(stages := getattr(config, key, None), list | tuple):
            yield from stages


def named_widths(config: PreTrainedConfig) -> list[int]:
    names = ("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embed_dim")
    named = (getattr(config, name, None) for name in names)
    return [size for size in named if isinstance(size, int)]


def hidden_size_is_the_configurations(model_type: str, model: Any, found: Architecture) -> None:
    text = named_widths(model.config.get_text_config(decoder=True))
    if model_type in OTHER_WIDTHS:
        assert found.hidden_size == OTHER_WIDTHS[model_type]
    elif found.vocab_size and text:
        assert found.hidden_size == (text[0] if found.blocks else None)
    elif found.hidden_size is not None:
        assert found.hidden_size in set(widths(model.config))
    else:
        assert model_type in listed(NO_ATTENTION)


def tied_weights_are_the_models(model_type: str, model: Any, found: Architecture) -> None:
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    tied = [group for group in names.values() if len(group) > 1]
    assert [set(group) for group in found.tied_weights] == tied
    fixed = {name.rpartition(".")[0] for group in tied for name in group}
    for name in found.quantizable:
        assert not any(re.fullmatch(found.target_regex([name]), path) for path in fixed)


def only_models_whose_tokens_meet_in_attention_alone_are_packable(
    model_type: str, model: Any, found: Architecture
) -> None:
    text = found.vocab_size is not None and found.kind in ("causal decoder", "encoder")
    assert found.packable == (text and model_type not in listed(NOT_PACKABLE))


@pytest.mark.parametrize(
    "model_type",
    [
        name if name in PEFT_TARGETS else pytest.param(name, marks=pytest.mark.slow)  # each imports a module of its own
        for name in TYPES
    ],
)
def test_what_is_detected_is_true_of_the_model(model_type: str) -> None:
    model = tiny(model_type)
    found = detect(model)
    for holds in (
        attention_and_feed_forward_are_found,
        defaults_are_layers_that_can_be_adapted,
        ia3_scales_what_it_adapts,
        hidden_size_is_the_configurations,
        tied_weights_are_the_models,
        only_models_whose_tokens_meet_in_attention_alone_are_packable,
    ):
        holds(model_type, model, found)
