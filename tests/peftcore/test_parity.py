"""Adapter directories are PEFT's, both ways: HF `peft` is the oracle, same logits within 1e-5 in float32."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from method_example import examples, randomise
from parity_log import agree
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from peftcore import LoraConfig, PeftModel, TaskType, get_peft_model

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the oracle warns of on import is its own affair
    import peft

pytestmark = pytest.mark.filterwarnings("ignore")  # the oracle warns about its own deprecated calls

DECODER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
ENCODER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,  # at the usual 0.02 methods that multiply the weight would hardly change the logits
}
FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**DECODER)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**DECODER)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**DECODER)),
    "bert": lambda: BertForSequenceClassification(BertConfig(**ENCODER, vocab_size=64)),
    "vit": lambda: ViTForImageClassification(ViTConfig(**ENCODER, image_size=16, patch_size=8)),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=64, decoder_start_token_id=0)
    ),
}


def build(family: str) -> nn.Module:
    torch.manual_seed(0)
    return FAMILIES[family]().eval()


def logits(family: str, model: Any, **inputs: Any) -> torch.Tensor:
    torch.manual_seed(1)
    tokens = torch.randint(1, 60, (2, 7))
    with torch.no_grad():
        if family == "vit":
            return model(pixel_values=torch.randn(2, 3, 16, 16), **inputs).logits
        if family == "t5":
            return model(input_ids=tokens, decoder_input_ids=tokens, **inputs).logits
        return model(input_ids=tokens, **inputs).logits


def both_ways(family: str, theirs: Any, ours: Any, tmp_path: Path, spread: float = 0.3, **inputs: Any) -> None:
    """Save with one, load with the other, compare logits; `theirs` and `ours` are configurations of the same thing."""
    read_here(family, theirs, tmp_path, spread, **inputs)
    read_there(family, ours, tmp_path, spread, **inputs)


def read_here(family: str, theirs: Any, tmp_path: Path, spread: float, **inputs: Any) -> None:
    hf = peft.get_peft_model(build(family), theirs).eval()
    randomise(hf, spread)
    expected = logits(family, hf, **inputs)
    assert (expected - logits(family, build(family))).abs().max() > 1e-3
    hf.save_pretrained(tmp_path / "hf")
    here = PeftModel.from_pretrained(build(family), tmp_path / "hf")
    method = here.peft_config["default"].method
    agree(logits(family, here, **inputs), expected, method, family, made_by="peft")


def read_there(family: str, ours: Any, tmp_path: Path, spread: float, **inputs: Any) -> None:
    model = get_peft_model(build(family), ours).eval()
    randomise(model, spread)
    model.save_pretrained(tmp_path / "ours")
    there = peft.PeftModel.from_pretrained(build(family), tmp_path / "ours").eval()
    result, expected = logits(family, model, **inputs), logits(family, there, **inputs)
    agree(result, expected, ours.method, family, made_by="peftcore")


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_default_targets(family: str, tmp_path: Path) -> None:
    unknown_to_peft = {"vit": ["q_proj", "v_proj"]}.get(family)
    both_ways(family, peft.LoraConfig(r=4, target_modules=unknown_to_peft), LoraConfig(r=4), tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_all_linear(family: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "use_rslora": True}
    theirs = peft.get_peft_model(build(family), peft.LoraConfig(**options))
    ours = get_peft_model(build(family), LoraConfig(**options))
    count = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert ours.get_nb_trainable_parameters()[0] == count
    # at s = 8 on every layer, larger weights amplify float32's rounding beyond the tolerance on some processors
    both_ways(family, peft.LoraConfig(**options), LoraConfig(**options), tmp_path, spread=0.1)


TARGETS: dict[str, list[str]] = {
    "gpt2": ["c_attn", "mlp.c_proj"],
    "llama": ["q_proj", "down_proj"],
    "mistral": ["v_proj", "gate_proj"],
    "qwen2": ["k_proj", "o_proj"],
    "bert": ["query", "intermediate.dense"],
    "vit": ["q_proj", "fc1"],
    "t5": ["q", "wo"],
}
CASES = [
    pytest.param(
        method, case, family, id=f"{method}-{case}-{family}", marks=[pytest.mark.slow] if number else []
    )  # the quick tests compare each case on one family
    for method, example in examples().items()
    for case in example.parity
    for number, family in enumerate(example.families)
]


@pytest.mark.parametrize("method, case, family", CASES)
def test_method(method: str, case: str, family: str, tmp_path: Path) -> None:
    example = examples()[method]
    targets = example.targets.get(family, TARGETS[family])
    options = {"target_modules": targets, **copy.deepcopy(dict(example.parity[case]))}
    theirs, ours = getattr(peft, example.theirs)(**copy.deepcopy(options)), example.config(**options)
    if (case, family) in example.only_ours:
        with pytest.raises(RuntimeError):
            read_here(family, theirs, tmp_path, example.spread, **example.inputs)
        read_there(family, ours, tmp_path, example.spread, **example.inputs)
    else:
        both_ways(family, theirs, ours, tmp_path, example.spread, **example.inputs)


PATTERNS: dict[str, dict[str, Any]] = {
    "rank and alpha patterns": {
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 6},
        "alpha_pattern": {"1.self_attn.v_proj": 32},
    },
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "layers_to_transform": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "layers_pattern": {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
    "exclude": {"target_modules": "all-linear", "exclude_modules": r".*layers\.0\..*"},
    "regular expression": {"target_modules": r".*self_attn\.(q|k)_proj"},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "model.norm"]},
}


@pytest.mark.parametrize("case", PATTERNS)
def test_lora_options(case: str, tmp_path: Path) -> None:
    options = {"r": 4, "lora_alpha": 16, **PATTERNS[case]}
    both_ways("llama", peft.LoraConfig(**copy.deepcopy(options)), LoraConfig(**options), tmp_path)


@pytest.mark.parametrize("mode", ["all", "lora_only"])
def test_bias_modes(mode: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"r": 4, "bias": mode, "target_modules": ["query", "dense"]}
    both_ways("bert", peft.LoraConfig(**options), LoraConfig(**options), tmp_path)


def test_task_type_trains_and_saves_the_head(tmp_path: Path) -> None:
    options: dict[str, Any] = {"r": 4, "target_modules": ["query"]}
    ours = LoraConfig(task_type=TaskType.SEQ_CLS, **options)
    both_ways("bert", peft.LoraConfig(task_type="SEQ_CLS", **options), ours, tmp_path)
    assert ours.modules_to_save is None, "the user's configuration is never changed"


@pytest.mark.parametrize("kind", ["Conv1d", "Conv2d", "Conv3d", "Conv2d grouped", "Embedding"])
def test_lora_on_convolutions_and_embeddings(kind: str, tmp_path: Path) -> None:
    layers: dict[str, tuple[nn.Module, torch.Tensor]] = {
        "Conv1d": (nn.Conv1d(6, 8, 3, padding=1, stride=2), torch.randn(2, 6, 9)),
        "Conv2d": (nn.Conv2d(6, 8, (3, 5), padding=2), torch.randn(2, 6, 9, 9)),
        "Conv3d": (nn.Conv3d(4, 8, 2), torch.randn(2, 4, 5, 5, 5)),
        "Conv2d grouped": (nn.Conv2d(6, 8, 3, groups=2), torch.randn(2, 6, 9, 9)),
        "Embedding": (nn.Embedding(20, 8), torch.randint(0, 20, (3, 5))),
    }
    layer, x = layers[kind]
    net = nn.Sequential(layer)
    hf = peft.get_peft_model(copy.deepcopy(net), peft.LoraConfig(r=4, target_modules=["0"], lora_alpha=12)).eval()
    randomise(hf, 0.3)
    hf.save_pretrained(tmp_path, save_embedding_layers=False)
    here = PeftModel.from_pretrained(copy.deepcopy(net), tmp_path)
    agree(here(x), hf(x), "LORA", kind, made_by="peft")
    assert (hf(x) - net(x)).abs().max() > 1e-2
