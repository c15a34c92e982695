"""The methods that transformers gives every model for adapters act on ours, with and without HF PEFT installed."""

import copy
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.peft import PeftAdapterMixin

import peftcore
from peftcore import (
    AdapterNameError,
    CheckpointError,
    ConfigError,
    LoraConfig,
    MergeError,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
)
from peftcore.files.tensors import PREFIX


@pytest.fixture(params=[True, False], ids=["with peft", "without"], autouse=True)
def installed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.param:
        monkeypatch.setitem(sys.modules, "peft", None)

        def absent(*_: Any, **__: Any) -> None:
            raise ImportError("peft is not installed")

        monkeypatch.setattr("transformers.integrations.peft.check_peft_version", absent)


@pytest.fixture
def model() -> Any:
    """With adapters a, which acts, and b."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).eval()
    config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    made = get_peft_model(base, config, "a")
    made.add_adapter("b", LoraConfig(target_modules=["down_proj"], init_lora_weights=False))
    return made.eval()


@torch.no_grad()
def logits(model: Any, **options: Any) -> Tensor:
    return model(torch.arange(9)[None], **options).logits


def test_disabled_the_model_is_its_base_until_it_is_enabled(model: Any) -> None:
    adapted = logits(model)
    with model.disable_adapter():
        base = logits(model)
    model.disable_adapters()
    assert torch.equal(logits(model), base) and not torch.equal(base, adapted)
    assert model.active_adapters() == ["a"]
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), base)  # the end of the context does not enable
    assert torch.equal(logits(model, adapter_names="a"), adapted)  # what is asked for by name acts
    model.set_adapter("b")
    assert torch.equal(logits(model), base)
    model.set_adapter("a")
    model.enable_adapters()
    assert torch.equal(logits(model), adapted)


def test_what_comes_while_disabled_does_not_act(model: Any) -> None:
    model.disable_adapters()
    base = logits(model)
    model.add_adapter("c", LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.set_adapter(["b", "c"])
    model.delete_adapter("a")
    assert torch.equal(logits(model), base)
    again = copy.deepcopy(model)
    assert torch.equal(logits(again), base)
    again.enable_adapters()
    assert not torch.equal(logits(again), base)
    plain = model.unload()
    assert torch.equal(logits(plain), base)


def test_prompts_are_disabled_too(model: Any) -> None:
    prompted = get_peft_model(model.unload(), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")).eval()
    with prompted.disable_adapter():
        base = logits(prompted)
    prompted.disable_adapters()
    assert torch.equal(logits(prompted), base)


def test_merged_and_disabled_do_not_go_together(model: Any) -> None:
    model.merge_adapter()
    with pytest.raises(MergeError, match="unmerge_adapter first"):
        model.disable_adapters()
    model.unmerge_adapter()
    model.disable_adapters()
    with pytest.raises(MergeError, match="enable_adapters first"):
        model.merge_adapter()
    with pytest.raises(MergeError, match="enable_adapters first"):
        model.merge_and_unload()


def test_set_adapter_and_active_adapters(model: Any) -> None:
    model.set_adapter(["b", "a"])
    assert model.active_adapters() == ["b", "a"] == list(model.active_adapters)
    with pytest.raises(AdapterNameError, match="nothing"):
        model.set_adapter("nothing")


def test_add_adapter_in_transformers_order_makes_it_active(model: Any) -> None:
    model.add_adapter(LoraConfig(target_modules=["q_proj"]), "c")
    assert model.active_adapters() == ["c"]
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    assert model.active_adapters() == ["default"]
    model.add_adapter("d", LoraConfig(target_modules=["q_proj"]))
    assert model.active_adapters() == ["default"]
    for wrong in (("e",), (LoraConfig(), 3), ("e", "f")):
        with pytest.raises((ConfigError, AdapterNameError), match=r"a name and a configuration|got 3"):
            model.add_adapter(*wrong)


def test_several_are_deleted_or_none(model: Any) -> None:
    with pytest.raises(AdapterNameError, match="nothing"):
        model.delete_adapter(["a", "nothing"])
    assert list(model.peft_config) == ["a", "b"]
    model.delete_adapter(["a", "b"])
    assert list(model.peft_config) == []


def test_the_adapters_state_by_the_models_own_paths(model: Any, tmp_path: Any) -> None:
    state = model.get_adapter_state_dict()
    model.save_pretrained(tmp_path, selected_adapters=["a"])
    assert sorted(state) == [
        f"model.layers.0.self_attn.{layer}.lora_{letter}.weight" for layer in ("q_proj", "v_proj") for letter in "AB"
    ]
    assert all(not key.startswith(PREFIX) for key in model.get_adapter_state_dict("b"))
    other = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    assert all(torch.equal(t, state[key] + 1) for key, t in model.get_adapter_state_dict(state_dict=other).items())


def test_every_public_method_of_transformers_is_ours(model: Any) -> None:
    names = [name for name in vars(PeftAdapterMixin) if not name.startswith("_")]
    assert names and [name for name in names if name not in vars(PeftModel)] == []


def test_load_adapter_exchanges_a_loaded_lora_after_enable_peft_hotswap(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, selected_adapters=["a"])
    expected = logits(model)
    model.enable_peft_hotswap(target_rank=8)
    assert set(model.adapter_ranks("a").values()) == {8}
    parameters = {name: p for name, p in model.named_parameters() if ".a." in name}
    for parameter in parameters.values():
        parameter.data.normal_()
    assert not torch.allclose(logits(model), expected)
    model.load_adapter(tmp_path / "a", "a")
    torch.testing.assert_close(logits(model), expected)
    assert all(p is parameters[name] for name, p in model.named_parameters() if ".a." in name)
    for parameter in parameters.values():
        parameter.data.normal_()
    model.load_adapter(tmp_path / "a", "a", hotswap=False)
    torch.testing.assert_close(logits(model), expected)
    with pytest.raises(ConfigError, match="is_trainable has no effect on an exchange"):
        model.load_adapter(tmp_path / "a", "a", is_trainable=True)


@pytest.mark.parametrize("shown", [True, False])
def test_a_merge_shows_its_progress_if_asked(shown: bool, model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model.merge_and_unload(progressbar=shown)
    said = capsys.readouterr().err
    assert ("merge: 100%" in said and "2/2" in said) is shown
    assert shown or said == ""


def test_one_name_is_merged_by_its_name(model: Any) -> None:
    adapted = logits(model)
    plain = model.merge_and_unload(adapter_names="a")
    torch.testing.assert_close(logits(plain), adapted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("library", [peftcore, peft])
def test_loading_into_an_adapter_that_is_loaded_gives_it_the_saved_weights(library: Any, tmp_path: Path) -> None:
    def model() -> Any:
        torch.manual_seed(0)
        return library.get_peft_model(nn.Sequential(nn.Linear(4, 4)), library.LoraConfig(r=2, target_modules=["0"]))

    saved = model()
    for parameter in saved.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    saved.save_pretrained(tmp_path)
    x = torch.randn(3, 4)
    for is_trainable in (False, True):
        resumed = model()
        resumed.load_adapter(str(tmp_path), "default", is_trainable=is_trainable)
        torch.testing.assert_close(resumed(x), saved(x))
        assert all(p.requires_grad for p in resumed.parameters()) is False
        assert sum(p.requires_grad for p in resumed.parameters()) == 2, "the loaded adapter trains as before"
        assert resumed.training is is_trainable


def test_weights_of_another_rank_leave_a_loaded_adapter_as_it_was(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["0"])
    get_peft_model(nn.Sequential(nn.Linear(4, 4)), config).save_pretrained(tmp_path)
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=3, target_modules=["0"]))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"lora_A"):
        model.load_adapter(tmp_path, "default")
    with pytest.raises(ConfigError, match="config has no effect on 'default'"):
        model.load_adapter(tmp_path, "default", config=config)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training
