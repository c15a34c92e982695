"""Detection on tiny models built from transformers' own configurations, and on modules that are not theirs."""

import json

import pytest
import torch
import transformers
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS
from torch import nn
from transformers import AutoConfig

from peftcore.detection import Architecture, detect
from peftcore.errors import TargetError

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
            "dt_proj": "mixer",
            "out_proj": "mixer",
            "conv1d": "grouped_convolution",
            "lm_head": "head",
        },
    ),
}


@pytest.fixture(scope="module")
def architectures() -> dict[str, Architecture]:
    return {family: detect(build(family, case[0], **case[1])) for family, case in CASES.items()}


@pytest.mark.parametrize("family", CASES)
def test_roles_kind_and_sizes(family: str, architectures: dict[str, Architecture]) -> None:
    found, (_, _, kind, expected) = architectures[family], CASES[family]
    assert found.family == family
    assert found.kind == kind
    assert roles(found) == expected
    assert (found.num_blocks, found.hidden_size) == (2, 64)
    assert found.vocab_size == (None if family == "vit" else 320)
    assert found.all_linear == tuple(
        n for n, role in roles(found).items() if "convolution" not in role and role != "head"
    )


@pytest.mark.parametrize("family", sorted(set(CASES) & set(PEFT_TARGETS)))
def test_default_targets_are_those_of_peft(family: str, architectures: dict[str, Architecture]) -> None:
    assert set(architectures[family].default_targets) == set(PEFT_TARGETS[family])


@pytest.mark.parametrize("family", ["bart", "mpt", "gptj", "codegen", "gpt_bigcode", "gpt_neo", "deberta", "electra"])
def test_default_targets_are_those_of_peft_for_whole_size_configurations(family: str) -> None:
    auto_class = {"bart": SEQ2SEQ, "deberta": MASKED, "electra": MASKED}.get(family, CAUSAL)
    assert set(detect(build(family, auto_class)).default_targets) == set(PEFT_TARGETS[family])


def test_shapes_and_counts_of_grouped_query_attention(architectures: dict[str, Architecture]) -> None:
    modules = architectures["llama"].target_modules
    assert modules["k_proj"].shapes == ((64, 32, 2),)
    assert modules["down_proj"].shapes == ((176, 64, 2),)
    assert modules["q_proj"].patterns == ("model.layers.*.self_attn.q_proj",)
    assert architectures["llama"].block_pattern == "model.layers.*"


def test_conv1d_is_read_as_input_by_output(architectures: dict[str, Architecture]) -> None:
    c_fc = architectures["gpt2"].target_modules["c_fc"]
    assert (c_fc.in_features, c_fc.out_features) == (64, 256)


def test_encoder_decoder_has_two_lists_of_blocks(architectures: dict[str, Architecture]) -> None:
    assert {block.pattern for block in architectures["t5"].blocks} == {"encoder.block.*", "decoder.block.*"}
    assert architectures["t5"].target_modules["q"].count == 6  # two encoder, two decoder, two cross attentions


def test_stages_are_looked_into_for_their_blocks() -> None:
    swin = detect(build("swin", "AutoModel", depths=[1, 2], num_heads=[1, 2], embed_dim=32, image_size=32))
    assert [(block.pattern, block.count) for block in swin.blocks] == [("encoder.layers.*.blocks.*", 3)]
    assert swin.target_modules["fc1"].shapes == ((64, 256, 2), (32, 128, 1))


def test_raw_experts(architectures: dict[str, Architecture]) -> None:
    experts = architectures["mixtral"].experts
    up, down = experts["experts.gate_up_proj"], experts["experts.down_proj"]
    assert (up.role, up.experts, up.in_features, up.out_features, up.count) == ("fused_gate_up", 4, 64, 352, 2)
    assert (down.role, down.in_features, down.out_features, down.transposed) == ("down", 176, 64, False)
    assert "MixtralTopKRouter" in architectures["mixtral"].unreached


def test_transposed_experts() -> None:
    sizes = {**LLAMA, "num_local_experts": 4, "head_dim": 16}
    up = detect(build("gpt_oss", CAUSAL, **sizes)).experts["experts.gate_up_proj"]
    assert (up.transposed, up.in_features, up.out_features) == (True, 64, 352)


def test_tied_weights_name_every_place(architectures: dict[str, Architecture]) -> None:
    assert ("transformer.wte.weight", "lm_head.weight") in architectures["gpt2"].tied_weights
    assert architectures["llama"].tied_weights == ()
    untied = detect(build("gpt2", CAUSAL, **GPT2, tie_word_embeddings=False))
    assert untied.tied_weights == ()
    assert untied.parameters == architectures["gpt2"].parameters + 320 * 64


def test_parameters_are_those_that_torch_counts() -> None:
    for family in ("gpt2", "t5", "mixtral"):
        model = build(family, CASES[family][0], **CASES[family][1])
        assert detect(model).parameters == sum(p.numel() for p in model.parameters())


def test_quantizable_layers_fill_whole_blocks_and_exclude_the_head(architectures: dict[str, Architecture]) -> None:
    # 176 input features are no multiple of 64
    assert set(architectures["llama"].quantizable) == set(LLAMA_ROLES) - {"lm_head", "down_proj"}
    assert architectures["llama"].memory_nf4 < architectures["llama"].memory_bfloat16


def test_feed_forward_and_roles_as_targets(architectures: dict[str, Architecture]) -> None:
    assert architectures["phi3"].feed_forward == ("gate_up_proj", "down_proj")
    assert architectures["bert"].targets("key") == ("key",)


@pytest.mark.parametrize("family", ["gpt2", "bert", "t5", "vit"])
def test_regex_reaches_exactly_the_counted_layers(family: str) -> None:
    import re

    model = build(family, CASES[family][0], **CASES[family][1])
    found = detect(model)
    for name, info in found.target_modules.items():
        regex = found.target_regex([name])
        paths = [path for path, _ in model.named_modules() if re.fullmatch(regex, path)]
        assert len(paths) == info.count, name


@pytest.mark.parametrize("family", ["gpt2", "bert", "t5", "vit", "mamba"])
def test_names_without_a_star_are_suffixes_of_exactly_the_counted_layers(family: str) -> None:
    model = build(family, CASES[family][0], **CASES[family][1])
    for name, info in detect(model).target_modules.items():
        paths = [path for path, _ in model.named_modules() if f".{path}".endswith(f".{name}")]
        assert "*" in name or len(paths) == info.count, name


def test_everything_is_json(architectures: dict[str, Architecture]) -> None:
    for found in architectures.values():
        assert json.loads(json.dumps(found.to_dict()))["family"] == found.family


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


def test_quantised_layers_count_as_what_they_stand_for() -> None:
    from bitsandbytes.nn import Linear4bit

    model = nn.ModuleDict({"a": nn.Linear(64, 32), "b": nn.Linear(32, 8)})
    plain = detect(model)
    four_bit = Linear4bit(64, 32, quant_type="nf4")
    four_bit.load_state_dict(model["a"].state_dict())
    model["a"] = four_bit.to("cpu")
    found = detect(model)
    assert found.target_modules == plain.target_modules
    assert found.parameters == plain.parameters
    assert found.dtypes["uint8"] == 64 * 32


def test_a_plain_mlp_has_unknown_roles_and_no_proven_head() -> None:
    found = detect(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)))
    assert roles(found) == {"0": "unknown", "2": "unknown"}
    assert found.all_linear == found.default_targets == ("0", "2")
    assert (found.kind, found.num_blocks, found.hidden_size, found.vocab_size) == ("other", 0, None, None)
    assert found.family == "Sequential"


class Attention(nn.Module):
    def __init__(self, width: int, names: tuple[str, str, str, str]) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(width, width))


class Block(nn.Module):
    def __init__(self, width: int, names: tuple[str, str, str, str]) -> None:
        super().__init__()
        self.mix = Attention(width, names)
        self.w1, self.w2, self.w3 = (
            nn.Linear(width, 3 * width),
            nn.Linear(3 * width, width),
            nn.Linear(width, 3 * width),
        )


class Decoder(nn.Module):
    def __init__(self, outputs: int, names: tuple[str, str, str, str]) -> None:
        super().__init__()
        self.tokens = nn.Embedding(50, 16)
        self.trunk = nn.ModuleList(Block(16, names) for _ in range(3))
        self.answer = nn.Linear(16, outputs)


@pytest.mark.parametrize("names", [("wq", "wk", "wv", "wo"), ("a", "b", "c", "d")])
def test_a_plain_transformer_is_read_from_its_shapes(names: tuple[str, str, str, str]) -> None:
    found = detect(Decoder(50, names))
    attention = dict(zip(names, ("query", "key", "value", "output"), strict=True))
    assert roles(found) == {**attention, "w1": "gate", "w2": "down", "w3": "up", "answer": "head"}
    assert (found.block_pattern, found.num_blocks, found.hidden_size, found.vocab_size) == ("trunk.*", 3, 16, 50)


def test_a_classifier_after_the_blocks_is_the_head() -> None:
    assert detect(Decoder(7, ("wq", "wk", "wv", "wo"))).target_modules["answer"].role == "head"


def test_torch_multihead_attention_keeps_its_output_projection_to_itself() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32), 2, enable_nested_tensor=False)
    found = detect(encoder)
    assert found.all_linear == found.feed_forward == ("linear1", "linear2")
    # the fused input projection (48, 16) and the output projection's own (16, 16), which its forward only reads
    assert found.unreached == {"MultiheadAttention": 2 * 48 * 16, "NonDynamicallyQuantizableLinear": 2 * 16 * 16}
    assert found.kind == "encoder"


def test_a_convolutional_network_defaults_to_its_convolutions() -> None:
    found = detect(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)))
    assert found.default_targets == ("0", "2")
    assert found.all_linear == ()


@pytest.mark.parametrize("model", [nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.LayerNorm(4)), nn.Embedding(4, 4)])
def test_nothing_to_adapt_says_what_was_found(model: nn.Module) -> None:
    with pytest.raises(TargetError, match=r"no layer to adapt: found (no submodules|1 ReLU, 1 LayerNorm)"):
        detect(model)
