"""Kinds of models."""

from tiny_models import tiny

from peftcore.detection import detect


def test_a_word_for_every_kind_of_model() -> None:
    kinds = {
        "llama gpt2 mamba rwkv imagegpt qwen3_vl llava blip-2": "causal decoder",
        "t5 bart whisper vision-encoder-decoder florence2": "encoder-decoder",
        "bert mobilebert ibert squeezebert xlm-roberta perceiver clip siglip pi0 embedding_gemma2 wav2vec2 "
        "parakeet_ctc": "encoder",
        "vit swin resnet convnext dinov2 sam pp_lcnet hgnet_v2": "vision encoder",
        "encodec univnet": "other",
    }
    assert {name: detect(tiny(name)).kind for names in kinds for name in names.split()} == {
        name: kind for names, kind in kinds.items() for name in names.split()
    }
