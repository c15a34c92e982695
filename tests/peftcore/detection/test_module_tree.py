"""Module trees: block lists, stages, and adapter layers that are skipped."""

from detection_models import BERT, CAUSAL, LLAMA, MASKED, build
from torch import nn

from peftcore.detection import Architecture, detect


def test_encoder_decoder_has_two_lists_of_blocks(architectures: dict[str, Architecture]) -> None:
    assert {block.pattern for block in architectures["t5"].blocks} == {"encoder.block.*", "decoder.block.*"}
    assert architectures["t5"].target_modules["q"].count == 6  # two encoder, two decoder, two cross attentions


def test_stages_are_looked_into_for_their_blocks() -> None:
    swin = detect(build("swin", "AutoModel", depths=[1, 2], num_heads=[1, 2], embed_dim=32, image_size=32))
    assert [(block.pattern, block.count) for block in swin.blocks] == [("encoder.layers.*.blocks.*", 3)]
    assert swin.target_modules["fc1"].shapes == ((64, 256, 2), (32, 128, 1))


def test_meta_and_real_weights_read_the_same() -> None:
    assert detect(build("llama", CAUSAL, "meta", **LLAMA)) == detect(build("llama", CAUSAL, "cpu", **LLAMA))


class Host(nn.Module):
    """What any adapter library puts in a layer's place."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Linear(base_layer.in_features, 4, bias=False)

    @property
    def weight(self) -> nn.Parameter:
        return self.base_layer.weight


def test_a_model_with_adapters_reads_like_the_model_without() -> None:
    plain = detect(build("llama", CAUSAL, "cpu", **LLAMA, tie_word_embeddings=True))
    model = build("llama", CAUSAL, "cpu", **LLAMA, tie_word_embeddings=True)
    for block in model.model.layers:
        block.self_attn.q_proj = Host(block.self_attn.q_proj)
    model.lm_head = Host(Host(model.lm_head.cpu()).base_layer)
    assert detect(model) == plain


def test_a_peft_core_adapter_is_looked_through() -> None:
    from peftcore import LoraConfig, get_peft_model

    plain = detect(build("bert", MASKED, "cpu", **BERT))
    model = get_peft_model(build("bert", MASKED, "cpu", **BERT), LoraConfig(r=4, target_modules="all-linear"))
    assert detect(model) == plain
