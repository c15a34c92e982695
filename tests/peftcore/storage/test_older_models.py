"""Adapters that older versions of transformers have trained load onto the present models, as with HF PEFT or better."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from expert_models import IDS, mixtral, qwen
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from peftcore import CheckpointError, IA3Config, LoraConfig, PeftModel, get_peft_model
from peftcore.hf_peft.utils.hotswap import hotswap_adapter


def write(directory: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    save_file(
        {f"base_model.model.{key}": tensor for key, tensor in tensors.items()}, directory / "adapter_model.safetensors"
    )
    return directory


def pair(path: str, rank: int, inputs: int, outputs: int) -> dict[str, Tensor]:
    return {f"{path}.lora_A.weight": torch.randn(rank, inputs), f"{path}.lora_B.weight": torch.randn(outputs, rank)}


def old_mixtral(directory: Path, names: tuple[str, ...] = ("w1", "w2", "w3"), **options: Any) -> Path:
    """Write an adapter with the names of transformers 4."""
    torch.manual_seed(1)
    tensors = pair("model.layers.0.self_attn.q_proj", 2, 8, 8)
    for expert in range(3):
        for name in names:
            inputs, outputs = (12, 8) if name == "w2" else (8, 12)
            tensors |= pair(f"model.layers.0.block_sparse_moe.experts.{expert}.{name}", 2, inputs, outputs)
    config = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", *names], **options}
    return write(directory, config, tensors)


def merged_by_hand(model: Any, directory: Path, old: Callable[[str], str], scaling: float) -> Any:
    """Add the adapter's change to the weights of the present model."""
    tensors = {
        k.removeprefix("base_model.model."): t for k, t in load_file(directory / "adapter_model.safetensors").items()
    }
    state = model.state_dict()
    for key in [key for key in tensors if ".lora_A." in key]:
        change = scaling * tensors[key.replace(".lora_A.", ".lora_B.")] @ tensors[key]
        path = old(key.removesuffix(".lora_A.weight"))
        if ".experts." not in path:
            state[f"{path}.weight"] += change
            continue
        before, _, rest = path.partition(".experts.")
        expert, name = rest.split(".")
        if name in ("w2", "down_proj"):
            state[f"{before}.experts.down_proj"][int(expert)] += change
        else:
            half = state[f"{before}.experts.gate_up_proj"][int(expert)].chunk(2)
            half[name in ("w3", "up_proj")].add_(change)
    return model


def mixtral_path(path: str) -> str:
    return path.replace("block_sparse_moe", "mlp")


TARGETS: dict[str, dict[str, Any]] = {
    "names": {},
    "regular expression": {"target_modules": r".*(q_proj|block_sparse_moe\.experts\.\d+\.w[123])"},
    "rslora": {"use_rslora": True, "lora_alpha": 3 * 2**0.5},
}


@pytest.mark.parametrize("options", TARGETS.values(), ids=TARGETS.keys())
def test_the_experts_of_mixtral(options: dict[str, Any], tmp_path: Path) -> None:
    directory = old_mixtral(tmp_path / "old", **options)
    expected = merged_by_hand(mixtral(), directory, mixtral_path, 3.0)(IDS).logits
    model = PeftModel.from_pretrained(mixtral(), directory)
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "new")
    torch.testing.assert_close(
        PeftModel.from_pretrained(mixtral(), tmp_path / "new")(IDS).logits, expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.filterwarnings("ignore")  # the oracle's own
def test_the_experts_of_mixtral_as_hf_peft_reads_them(tmp_path: Path) -> None:
    directory = old_mixtral(tmp_path / "old")
    theirs = peft.PeftModel.from_pretrained(mixtral(), str(directory)).eval()
    ours = PeftModel.from_pretrained(mixtral(), directory)
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=1e-4, atol=1e-5)


def test_one_of_two_fused_layers_is_enough(tmp_path: Path) -> None:
    directory = old_mixtral(tmp_path / "old", ("w3",))
    expected = merged_by_hand(mixtral(), directory, mixtral_path, 3.0)(IDS).logits
    torch.testing.assert_close(
        PeftModel.from_pretrained(mixtral(), directory)(IDS).logits, expected, rtol=1e-4, atol=1e-5
    )


def test_the_experts_of_qwen_beside_a_shared_one(tmp_path: Path) -> None:
    torch.manual_seed(1)
    tensors = pair("model.layers.0.mlp.shared_expert.up_proj", 2, 8, 8) | pair("model.layers.0.mlp.gate", 2, 8, 3)
    for expert in range(3):
        for name in ("gate_proj", "up_proj", "down_proj"):
            inputs, outputs = (16, 8) if name == "down_proj" else (8, 16)
            tensors |= pair(f"model.layers.0.mlp.experts.{expert}.{name}", 2, inputs, outputs)
    config = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}
    directory = write(tmp_path / "old", config, tensors)
    expected = merged_by_hand(qwen(), directory, str, 2.0)(IDS).logits
    torch.testing.assert_close(PeftModel.from_pretrained(qwen(), directory)(IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_dropout_of_fused_experts_is_dropped_with_a_warning(tmp_path: Path) -> None:
    directory = old_mixtral(tmp_path / "old", lora_dropout=0.1)
    with pytest.warns(UserWarning, match=r"lora_dropout=0\.1 is dropped"):
        model = PeftModel.from_pretrained(mixtral(), directory)
    assert model.peft_config["default"].lora_dropout == 0


@pytest.mark.filterwarnings("ignore:(rank|alpha)_pattern.* match no adapted layer:RuntimeWarning")
def test_experts_that_cannot_be_fused(tmp_path: Path) -> None:
    directory = old_mixtral(tmp_path / "old", alpha_pattern={"w1": 2})
    with pytest.raises(CheckpointError, match="different scalings for its parts"):
        PeftModel.from_pretrained(mixtral(), directory)
    directory = old_mixtral(tmp_path / "part")
    tensors = load_file(directory / "adapter_model.safetensors")
    save_file({k: t for k, t in tensors.items() if "experts.1.w3" not in k}, directory / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing .*experts.*unexpected .*experts"):
        PeftModel.from_pretrained(mixtral(), directory)


def test_an_older_adapter_can_take_the_place_of_a_loaded_one(tmp_path: Path) -> None:
    first = old_mixtral(tmp_path / "first")
    model = PeftModel.from_pretrained(mixtral(), first)
    other = old_mixtral(tmp_path / "other")
    tensors = {key: 0.5 * tensor for key, tensor in load_file(other / "adapter_model.safetensors").items()}
    save_file(tensors, other / "adapter_model.safetensors")
    expected = merged_by_hand(mixtral(), other, mixtral_path, 3.0)(IDS).logits
    hotswap_adapter(model, other, "default")
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-5)


# -- renamed modules -------------------------------------------------------------------------------------------------


def llava() -> Any:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=31)
    ).eval()


NOW, BEFORE = "model.language_model.layers", "language_model.model.layers"
OLD_NAMES: dict[str, dict[str, Any]] = {
    "regular expression": {"target_modules": rf"{BEFORE}\.\d+\.self_attn\.(q|v)_proj".replace(".model.", r"\.model\.")},
    "full paths": {"target_modules": [f"{BEFORE}.0.self_attn.q_proj", f"{BEFORE}.0.self_attn.v_proj"]},
    "excluded": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r"vision_tower\..*"},
}


@pytest.mark.parametrize("options", OLD_NAMES.values(), ids=OLD_NAMES.keys())
def test_targets_with_the_former_names_of_modules(options: dict[str, Any], tmp_path: Path) -> None:
    patterns = {
        "rank_pattern": {f"{BEFORE}.0.self_attn.v_proj": 3},
        "alpha_pattern": {f"{BEFORE}.0.self_attn.v_proj": 9},
    }
    config = LoraConfig(
        r=2,
        target_modules=r".*language_model.*\.(q|v)_proj",
        rank_pattern={"v_proj": 3},
        alpha_pattern={"v_proj": 9},
        init_lora_weights=False,
    )
    trained = get_peft_model(llava(), config).eval()
    expected = trained(IDS).logits
    tensors = {key.replace(NOW, BEFORE): tensor for key, tensor in trained.get_adapter_state_dict().items()}
    directory = write(tmp_path / "old", {"r": 2, "lora_alpha": 8, **options, **patterns}, tensors)
    model = PeftModel.from_pretrained(llava(), directory)
    torch.testing.assert_close(model(IDS).logits, expected)
    assert model.adapter_ranks() == trained.adapter_ranks()


def test_other_methods_of_renamed_modules(tmp_path: Path) -> None:
    config = IA3Config(target_modules=r".*language_model.*\.(k|v)_proj", feedforward_modules=[], init_ia3_weights=False)
    trained = get_peft_model(llava(), config).eval()
    tensors = {key.replace(NOW, BEFORE): tensor for key, tensor in trained.get_adapter_state_dict().items()}
    options = {"target_modules": rf"{BEFORE}.*[kv]_proj", "feedforward_modules": []}
    directory = write(tmp_path / "old", {"peft_type": "IA3", **options}, tensors)
    torch.testing.assert_close(PeftModel.from_pretrained(llava(), directory)(IDS).logits, trained(IDS).logits)


def test_targets_that_never_existed_are_an_error(tmp_path: Path) -> None:
    tensors = pair("model.nowhere.q_proj", 2, 16, 16)
    directory = write(tmp_path / "foreign", {"r": 2, "target_modules": ["nowhere.q_proj"]}, tensors)
    with pytest.raises(CheckpointError, match="does not fit"):
        PeftModel.from_pretrained(llava(), directory)
