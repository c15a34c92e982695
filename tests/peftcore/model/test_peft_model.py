"""The class of a model with adapters, and its way back to the plain class."""

import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM
from transformers.integrations.peft import PeftAdapterMixin
from two_adapters import logits

from peftcore import LoraConfig, PeftModel, get_peft_model


def test_every_public_method_of_transformers_is_ours(model: Any) -> None:
    names = [name for name in vars(PeftAdapterMixin) if not name.startswith("_")]
    assert names and [name for name in names if not hasattr(PeftModel, name)] == []


@pytest.mark.parametrize("shown", [True, False])
def test_a_merge_shows_its_progress_if_asked(shown: bool, model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model.merge_and_unload(progressbar=shown)
    said = capsys.readouterr().err
    assert ("merge: 100%" in said and "2/2" in said) is shown
    assert shown or said == ""


def test_the_class_has_the_models_own_name_and_forward(model: Any) -> None:
    kind = type(model)
    assert issubclass(kind, PeftModel) and issubclass(kind, LlamaForCausalLM)
    assert (kind.__name__, kind.__module__) == (LlamaForCausalLM.__name__, LlamaForCausalLM.__module__)
    assert inspect.signature(model.forward) == inspect.signature(LlamaForCausalLM.forward.__get__(model))
    plain = model.unload()
    assert type(plain) is LlamaForCausalLM


def test_a_pickle_stores_the_plain_class(model: Any) -> None:
    again = pickle.loads(pickle.dumps(model))
    assert type(again) is type(model)
    assert torch.equal(logits(again), logits(model))


def test_the_base_model_saves_its_own_weights(model: Any, tmp_path: Path) -> None:
    """HF PEFT's LoftQ example takes the adapters out of the base model by hand, and saves the base model."""
    base = model.get_base_model()
    assert type(base) is LlamaForCausalLM and not isinstance(base, PeftModel)
    assert base.lm_head is model.lm_head and base.config is model.config
    assert torch.equal(base(torch.arange(3)[None]).logits, model(torch.arange(3)[None]).logits)
    for name, layer in list(base.named_modules()):
        if hasattr(layer, "base_layer"):
            base.set_submodule(name, layer.base_layer)
    base.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    saved = LlamaForCausalLM.from_pretrained(tmp_path).state_dict()
    assert saved.keys() == base.state_dict().keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in base.state_dict().items())


def test_a_subclass_of_the_class_is_unloaded_to_the_plain_class(model: Any) -> None:
    model.__class__ = type("Wrapped", (type(model),), {})
    assert type(model.unload()) is LlamaForCausalLM


def test_the_call_of_the_class_and_of_the_function_do_the_same() -> None:
    plain = nn.Sequential(nn.Linear(4, 4))
    model = PeftModel(plain, LoraConfig(target_modules=["0"]), "mine")
    assert model is plain
    assert list(model.peft_config) == ["mine"]
    assert type(model)(nn.Linear(2, 2))[0].in_features == 2, "its own class makes plain models"


def test_a_saved_adapter_is_loaded_as_the_active_one(model: Any, tmp_path: Path) -> None:
    expected = logits(model)
    model.save_pretrained(tmp_path)
    plain = model.unload()
    loaded = PeftModel.from_pretrained(plain, tmp_path / "a", "again")
    assert loaded is plain
    assert loaded.active_adapters == ["again"]
    assert not any(p.requires_grad for p in loaded.parameters())
    torch.testing.assert_close(logits(loaded), expected)
    with pytest.raises(TypeError, match="needs the base model first"):
        PeftModel.from_pretrained(tmp_path / "a", plain)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="has no option 'revisoin'; did you mean 'revision'"):
        PeftModel.from_pretrained(plain, tmp_path / "a", "more", revisoin="main")


def test_calls_of_a_replica_use_the_route_that_was_open(model: Any) -> None:
    adapted = logits(model, adapter_names="b")
    with model.route("b"):
        replica = model._replicate_for_data_parallel()
    replica._parameters, replica._buffers, replica._modules = model._parameters, model._buffers, model._modules
    assert torch.equal(logits(replica), adapted)
    assert not torch.equal(logits(model), adapted)


class DiffusersLike(nn.Module):
    """A model whose own `delete_adapters` works as that of diffusers' models."""

    _hf_peft_config_loaded: bool | None = False

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x)

    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            for module in self.modules():
                if hasattr(module, "delete_adapter") and module is not self:
                    module.delete_adapter(name)  # type: ignore[operator]
            self.peft_config.pop(name, None)  # type: ignore[union-attr, operator]
            if not self.peft_config:
                del self.peft_config


def test_diffusers_delete_adapters_deletes_from_a_peft_model() -> None:
    base = DiffusersLike()
    x = torch.ones(1, 4)
    expected = base(x)
    config = LoraConfig(r=2, target_modules=["lin"], init_lora_weights=False)
    model: Any = get_peft_model(base, config, "toy")
    model.add_adapter("other", config)
    with pytest.warns(UserWarning, match="'other' is the active one now"):
        model.delete_adapters(["toy", "unknown"])
    assert list(model.peft_config) == model.active_adapters == ["other"]
    model.delete_adapters("other")
    torch.testing.assert_close(base(x), expected)
    assert not model.peft_config
    model = get_peft_model(base, config, "pixel")
    assert list(model.peft_config) == model.active_adapters == ["pixel"]
    assert not torch.allclose(base(x), expected)
