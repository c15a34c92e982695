"""Options for reading a saved adapter, and adapters as they are published."""

import json
from pathlib import Path
from typing import Any, ClassVar

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from peftcore import CheckpointError, ConfigError, LoraConfig, PeftConfig, PeftModel, get_peft_model, load_peft_weights


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    config = LoraConfig(r=2, target_modules=["first"], modules_to_save=["second"], init_lora_weights=False)
    get_peft_model(Net(), config).save_pretrained(tmp_path)
    return tmp_path


def rewritten(directory: Path, new_key: Any) -> dict[str, Tensor]:
    """Save the weights under other keys, without a manifest; None drops a tensor. Return them."""
    weights = directory / "adapter_model.safetensors"
    tensors = {new: tensor for key, tensor in load_file(weights).items() if (new := new_key(key)) is not None}
    save_file(tensors, weights)
    (directory / "SHA256SUMS").unlink(missing_ok=True)
    return tensors


def output(model: nn.Module) -> Tensor:
    return model(torch.linspace(-1, 1, 12).view(2, 6)).detach()


# -- keys -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spelled",
    [
        lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
        lambda key: f"_orig_mod.{key}",
        lambda key: f"module.{key}",
        lambda key: key.replace(".weight", ".default.weight") if "lora" in key else key,
        lambda key: key.replace(".weight", ".mine.weight") if "lora" in key else key,
        lambda key: key.replace("second.", "second.modules_to_save.default."),
        lambda key: key.removeprefix("base_model.model."),
    ],
    ids=["compiled layer", "compiled model", "distributed", "default", "own name", "copy", "no prefix"],
)
def test_keys_of_a_state_dict_that_was_saved_by_hand(spelled: Any, saved: Path) -> None:
    expected = output(PeftModel.from_pretrained(Net(), saved))
    before = load_file(saved / "adapter_model.safetensors").keys()
    assert rewritten(saved, spelled).keys() != before
    torch.testing.assert_close(output(PeftModel.from_pretrained(Net(), saved, "mine")), expected)


def test_a_key_mapping_renames_as_hf_pefts_does(saved: Path) -> None:
    expected = output(PeftModel.from_pretrained(Net(), saved))
    rewritten(saved, lambda key: key.replace("model.first", "model.old.1"))
    mapping = {r"old\.(\d)": "first", "first": "never, because only the first expression that occurs is used"}
    ours = PeftModel.from_pretrained(Net(), saved, key_mapping=mapping)
    torch.testing.assert_close(output(ours), expected)
    theirs = peft.utils.load_peft_weights(str(saved), device="cpu", key_mapping=mapping)
    weights = load_peft_weights(saved, "cpu", mapping)
    assert weights.keys() == theirs.keys() and all(torch.equal(weights[key], theirs[key]) for key in theirs)
    ours.load_adapter(saved, "more", key_mapping=mapping)
    with pytest.raises(CheckpointError, match="does not fit: missing"):
        PeftModel.from_pretrained(Net(), saved)
    with pytest.raises(ConfigError, match="key_mapping must be"):
        PeftModel.from_pretrained(Net(), saved, key_mapping={"(": "x"})
    with pytest.raises(CheckpointError, match="gives several tensors the key"):
        PeftModel.from_pretrained(Net(), saved, key_mapping={"lora_[AB]": "lora_A"})


def test_the_mapping_of_modules_that_transformers_renamed_is_the_default(saved: Path) -> None:
    class Renamed(Net):
        _checkpoint_conversion_mapping: ClassVar = {r"^older\.": "first."}

    expected = output(PeftModel.from_pretrained(Net(), saved))
    rewritten(saved, lambda key: key.replace("model.first.", "model.older."))
    torch.testing.assert_close(output(PeftModel.from_pretrained(Renamed(), saved)), expected)
    with pytest.raises(CheckpointError, match="does not fit"):
        PeftModel.from_pretrained(Renamed(), saved, key_mapping={"nothing": "x"})


def tiny_llava() -> Any:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=31))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # HF PEFT reads it
def test_an_adapter_from_before_transformers_renamed_its_modules(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=r".*language_model.*\.v_proj", init_lora_weights=False)
    ids = torch.tensor([[1, 2, 3]])
    trained = get_peft_model(tiny_llava(), config)
    trained.save_pretrained(tmp_path)
    now, before = ".model.language_model.layers.", ".language_model.model.layers."
    keys = rewritten(tmp_path, lambda key: key.replace(now, before))
    assert any(before in key for key in keys)
    loaded = PeftModel.from_pretrained(tiny_llava(), tmp_path)
    torch.testing.assert_close(loaded(ids).logits, trained.eval()(ids).logits)
    theirs = peft.PeftModel.from_pretrained(tiny_llava(), str(tmp_path))
    torch.testing.assert_close(loaded(ids).logits, theirs(ids).logits)


def test_a_directory_that_lacks_a_layer_is_refused_unless_the_caller_accepts_it(saved: Path) -> None:
    rewritten(saved, lambda key: None if "lora_B" in key else key.replace("second.bias", "third.bias"))
    with pytest.raises(CheckpointError, match=r"missing .*lora_B.*unexpected .*third\.bias.*strict=False"):
        PeftModel.from_pretrained(Net(), saved)
    with pytest.warns(UserWarning, match=r"missing .*lora_B.*unexpected .*third.*initial values"):
        model = PeftModel.from_pretrained(Net(), saved, strict=False)
    torch.testing.assert_close(model.get_adapter_state_dict()["second.bias"], Net().second.bias)
    with pytest.warns(UserWarning, match="initial values"):
        result = model.load_adapter(saved, "more", strict=False)
    assert result.missing_keys == [
        "base_model.model.first.lora_B.more.weight",
        "base_model.model.second.modules_to_save.more.bias",
    ]
    assert result.unexpected_keys == ["base_model.model.third.bias"]
    rewritten(saved, lambda key: f"foreign.{key}")
    with pytest.raises(CheckpointError, match="does not fit"):  # nothing of the adapter is there
        PeftModel.from_pretrained(Net(), saved, strict=False)


def test_load_adapter_reports_missing_keys_under_hf_pefts_names(tmp_path: Path) -> None:
    get_peft_model(Net(), LoraConfig(r=2, target_modules=["first"])).save_pretrained(tmp_path)
    ours, theirs = PeftModel.from_pretrained(Net(), tmp_path), peft.PeftModel.from_pretrained(Net(), str(tmp_path))
    result = ours.load_adapter(tmp_path, "whole")
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    rewritten(tmp_path, lambda key: None if "lora_B" in key else key)
    with pytest.warns(UserWarning, match="initial values"):
        result = ours.load_adapter(tmp_path, "part", strict=False)
    assert result.missing_keys == theirs.load_adapter(str(tmp_path), "part").missing_keys


def test_tensors_of_another_shape_can_be_left_out(saved: Path) -> None:
    weights = saved / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file(tensors | {"base_model.model.second.weight": torch.zeros(9, 6)}, weights)
    (saved / "SHA256SUMS").unlink()
    with pytest.raises(CheckpointError, match="another base model"):
        PeftModel.from_pretrained(Net(), saved, strict=False)
    with pytest.warns(UserWarning, match=r"second\.weight is \[9, 6\], here \[6, 6\]; .*initial values"):
        model = PeftModel.from_pretrained(Net(), saved, ignore_mismatched_sizes=True)
    torch.testing.assert_close(model.get_adapter_state_dict()["second.weight"], Net().second.weight)


# -- configurations ---------------------------------------------------------------------------------------------------


def test_configurations_as_they_are_published(saved: Path) -> None:
    path = saved / "adapter_config.json"
    values = json.loads(path.read_text()) | {"peft_type": "lora", "use_next_years_option": {"a": 1}}
    path.write_text(json.dumps(values))
    with pytest.warns(UserWarning, match="unknown to this version: 'use_next_years_option'; kept"):
        config = PeftConfig.from_pretrained(saved)
    assert isinstance(config, LoraConfig) and config.extra == {"use_next_years_option": {"a": 1}}


def test_a_configuration_is_saved_with_the_class_of_its_base(tmp_path: Path) -> None:
    mapping = {"base_model_class": "A", "parent_library": "b"}
    config = LoraConfig(target_modules=["x"])
    config.save_pretrained(tmp_path / "new", auto_mapping_dict=mapping)
    assert PeftConfig.from_pretrained(tmp_path, subfolder="new").auto_mapping == mapping and config.auto_mapping is None
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file; give a directory"):
        config.save_pretrained(tmp_path / "file")
    with pytest.raises(TypeError, match=r"save_pretrained\(\) has no option 'format'"):
        config.save_pretrained(tmp_path, format="yaml")


# -- options ----------------------------------------------------------------------------------------------------------


def test_values_that_do_not_fit_are_refused_and_change_nothing(saved: Path) -> None:
    model = PeftModel.from_pretrained(Net(), saved)
    for option, message in {
        "torch_device": "torch_device='no' is not a device of this machine",
        "strict": "strict must be True or False",
        "low_cpu_mem_usage": "low_cpu_mem_usage must be True or False",
        "autocast_adapter_dtype": "autocast_adapter_dtype must be True or False",
        "ephemeral_gpu_offload": "ephemeral_gpu_offload must be True or False",
        "use_safetensors": "use_safetensors must be True",
        "config": "config must be a configuration",
    }.items():
        with pytest.raises(ConfigError, match=message):
            model.load_adapter(saved, "more", **{option: "no"})
    with pytest.raises(ConfigError, match="use one of the two"):
        model.load_adapter(saved, "more", low_cpu_mem_usage=True, strict=False)
    with pytest.raises(TypeError, match=r"load_adapter\(\) has no option 'subfoldr'; did you mean 'subfolder'"):
        model.load_adapter(saved, "more", subfoldr="x")
    assert list(model.peft_config) == ["default"]


def test_options_of_the_base_are_named_in_a_warning(saved: Path) -> None:
    with pytest.warns(UserWarning, match="device_map, torch_dtype has no effect: the adapter is on the devices of its"):
        PeftModel.from_pretrained(Net(), saved, device_map="auto", torch_dtype=torch.float16)


def test_offloading_needs_cuda(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="ephemeral_gpu_offload=True needs a CUDA device"):
        PeftModel.from_pretrained(Net(), saved, ephemeral_gpu_offload=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.warns(UserWarning, match="ephemeral_gpu_offload=True changes nothing"):
        PeftModel.from_pretrained(Net(), saved, ephemeral_gpu_offload=True)


def test_the_tensors_are_read_to_a_device_and_end_on_their_layers(saved: Path) -> None:
    model = PeftModel.from_pretrained(Net(), saved, torch_device="cpu")
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    weights = load_peft_weights(saved, device="meta")
    assert {tensor.device.type for tensor in weights.values()} == {"meta"}
    default = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    assert {tensor.device.type for tensor in load_peft_weights(saved).values()} == {default.type}
    with pytest.raises(TypeError, match=r"load_peft_weights\(\) has no option 'strict'"):
        load_peft_weights(saved, strict=False)
