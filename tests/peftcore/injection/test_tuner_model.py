"""`model.base_model`: the object between a model and its base in HF PEFT."""

import copy
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

import peftcore
from peftcore import (
    AdapterNameError,
    ConfigError,
    IA3Model,
    LoraConfig,
    LoraModel,
    PeftModel,
    TargetError,
    get_peft_model,
)

SIZES = {
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))


def test_base_model_model_is_the_model() -> None:
    model = get_peft_model(base(), LoraConfig(target_modules=["0"]))
    assert model.base_model.model is model
    assert isinstance(model.base_model, LoraModel)
    assert not isinstance(model.base_model, IA3Model)
    assert model.base_model.active_adapters == ["default"]
    assert model.base_model.peft_config is model.peft_config
    assert model.base_model.targeted_module_names == model.targeted_module_names == ["0"]
    assert model.base_model.prefix == model.prefix == "lora_"


def test_names_of_parameters_and_modules_begin_with_model_as_in_peft() -> None:
    plain = nn.Sequential(*base(), nn.BatchNorm1d(3))
    theirs = peft.get_peft_model(copy.deepcopy(plain), peft.LoraConfig(target_modules=["0"])).base_model
    ours = get_peft_model(plain, LoraConfig(target_modules=["0"])).base_model
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    assert [name for name, _ in ours.named_buffers()] == [name for name, _ in theirs.named_buffers()]
    modules = dict(ours.named_modules())
    assert modules.keys() <= dict(theirs.named_modules()).keys()
    assert isinstance(modules[""], LoraModel)
    assert modules["model"] is ours.model
    assert modules["model.2"] is ours.model.get_submodule("2")
    assert [name for name, _ in ours.named_modules(prefix="x")][:3] == ["x", "x.model", "x.model.0"]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda view: pickle.loads(pickle.dumps(view))])
def test_a_copy_holds_a_copy_of_the_model(duplicate: Any) -> None:
    model = get_peft_model(base(), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    tuner = duplicate(model.base_model)
    x = torch.randn(2, 4)
    assert isinstance(tuner, LoraModel) and tuner.model is not model
    torch.testing.assert_close(tuner(x), model(x))
    assert copy.copy(model.base_model).model is model
    with pytest.raises(AttributeError):
        _ = model.base_model.__no_such_protocol__


def test_raw_parameters_and_token_rows_are_no_targeted_modules() -> None:
    names = []
    for library in (peftcore, peft):
        config = library.LoraConfig(
            r=2, target_modules=["2"], target_parameters=["0.weight"], trainable_token_indices={"3": [1]}, bias="all"
        )
        model = library.get_peft_model(nn.Sequential(*base(), nn.Embedding(4, 4)), config)
        names.append((model.targeted_module_names, model.targeted_parameter_names))
    assert names[0] == names[1] == (["2"], ["0.weight"])


def test_a_models_own_prefix_stays() -> None:
    class Own(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(2, 2))
            self.prefix = nn.Parameter(torch.ones(2))

    plain = Own()
    own = plain.prefix
    assert get_peft_model(plain, LoraConfig(target_modules=["0"])).prefix is own


def test_layers_can_be_disabled_under_pefts_names() -> None:
    model = get_peft_model(base(), LoraConfig(target_modules=["0"], init_lora_weights=False))
    x = torch.randn(2, 4)
    y = model(x)
    model.disable_adapter_layers()
    assert not torch.equal(model(x), y)
    model.enable_adapter_layers()
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("kind", [LlamaForCausalLM, LlamaModel])
def test_transformers_own_methods_see_the_model_without_its_head(kind: type) -> None:
    plain = kind(LlamaConfig(**SIZES))
    decoder, embeddings = plain.get_decoder(), plain.get_input_embeddings()
    model = get_peft_model(plain, LoraConfig(r=2))
    assert model.base_model.model is model
    assert model.get_decoder() is decoder
    assert model.get_encoder() is plain.get_encoder()
    assert model.get_input_embeddings() is embeddings
    assert model.unload().base_model is decoder


def test_saving_and_counting_include_the_head(tmp_path: Path) -> None:
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**SIZES)), LoraConfig(r=2, modules_to_save=["lm_head"]))
    assert model.base_model.num_parameters() == model.num_parameters()
    model.base_model.save_pretrained(tmp_path)
    assert any("lm_head" in name for name in load_file(tmp_path / "adapter_model.safetensors"))


def test_calling_the_class_adds_an_adapter_and_keeps_the_models_class() -> None:
    plain = base()
    tuner = LoraModel(plain, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), "first")
    assert type(plain) is nn.Sequential
    x = torch.randn(2, 4)
    assert torch.equal(tuner(x), plain(x))
    y = tuner(x)
    tuner.disable_adapter_layers()
    assert not torch.equal(tuner(x), y)
    tuner.enable_adapter_layers()
    assert torch.equal(tuner(x), y)
    tuner.merge_adapter()
    torch.testing.assert_close(tuner(x), y)
    tuner.unmerge_adapter()
    tuner.delete_adapter("first")
    with pytest.raises(AdapterNameError):
        LoraModel(base())


@pytest.mark.parametrize("end", ["merge_and_unload", "unload"])
def test_a_model_that_keeps_its_class_is_merged_and_unloaded_as_in_peft(end: str) -> None:
    torch.manual_seed(1)
    x, outputs = torch.randn(2, 4, dtype=torch.float64), {}
    for library in (peft, peftcore):
        plain = base().double()
        config = library.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
        torch.manual_seed(2)
        tuner = library.LoraModel(plain, config, "first")
        unloaded = getattr(tuner, end)()
        assert unloaded is plain and type(unloaded[0]) is nn.Linear and not hasattr(plain, "peft_config")
        outputs[library] = unloaded(x)
    torch.testing.assert_close(outputs[peftcore], outputs[peft], atol=1e-12, rtol=0)
    adapted = get_peft_model(base(), LoraConfig(r=2, target_modules=["0"]))
    assert type(getattr(adapted.base_model, end)()) is nn.Sequential


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_a_second_call_of_the_class_makes_the_new_adapter_the_active_one() -> None:
    for library in (peft, peftcore):
        plain = base().bfloat16()
        config = library.LoraConfig(r=2, target_modules=["0"])
        library.LoraModel(plain, config, "first")
        tuner = library.LoraModel(plain, config, "second")
        assert tuner.active_adapters == ["second"] and plain[0].active_adapters == ["second"]
        assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
        tuner.set_requires_grad(["first", "second"], False)
        assert not any(p.requires_grad for p in plain.parameters())
        tuner.set_requires_grad("first")
        assert {n.split(".")[2] for n, p in plain.named_parameters() if p.requires_grad} <= {
            "first",
            "lora_A",
            "lora_B",
        }
    configs: dict[str, peftcore.PeftConfig] = {name: LoraConfig(r=2, target_modules=["0"]) for name in ("a", "b")}
    several = LoraModel(base(), configs, "a")
    assert set(several.peft_config) == {"a", "b"} and several.active_adapters == ["a"]
    with pytest.raises(ConfigError, match="config and peft_config are two names of one argument"):
        LoraModel(base(), LoraConfig(), peft_config=LoraConfig())


def test_methods_that_return_the_module_return_the_view() -> None:
    for library in (peft, peftcore):
        plain = base()
        tuner = library.LoraModel(plain, library.LoraConfig(r=2, target_modules=["0"]), "default")
        assert tuner.to(torch.float64).eval().requires_grad_(False) is tuner
        assert {p.dtype for p in plain.parameters()} == {torch.float64} and not plain.training
        assert type(tuner.cpu().train().merge_and_unload()[0]) is nn.Linear


def test_a_class_has_the_prefix_of_its_method() -> None:
    classes = {method: kind for method, kind in peft.PEFT_TYPE_TO_TUNER_MAPPING.items() if hasattr(kind, "prefix")}
    theirs = {method: kind.prefix for method, kind in classes.items()}
    assert {method: getattr(peftcore, kind.__name__).prefix for method, kind in classes.items()} == theirs
    assert peftcore.injection.tuner_model.TunerModel.prefix == ""


def test_set_adapter_trains_the_named_adapter_alone() -> None:
    model = get_peft_model(base(), LoraConfig(r=2, target_modules=["0"]))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["0"]))

    def trains() -> dict[str, bool]:
        return {name: model[0].lora_A[name].weight.requires_grad for name in ("default", "other")}

    model.base_model.set_adapter("other")
    assert trains() == {"default": False, "other": True}
    model.set_adapter("default")
    assert trains() == {"default": True, "other": False}
    model.set_adapter("other", inference_mode=True)
    assert trains() == {"default": False, "other": False}
    model.set_adapter(["default", "other"])
    assert trains() == {"default": True, "other": True}


def test_the_class_itself_makes_a_model_with_an_adapter() -> None:
    plain = base()
    model = PeftModel(plain, LoraConfig(r=2, target_modules=["0"]), "first")
    assert model is plain
    assert isinstance(model, PeftModel)
    assert model.active_adapter == "first"


def test_a_new_plain_model_can_be_made_by_the_class_of_a_model_with_adapters() -> None:
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**SIZES)), LoraConfig(r=2))
    other = type(model)(model.config)
    assert other is not model
    assert set(dict(other.named_parameters())) == set(dict(LlamaForCausalLM(model.config).named_parameters()))


def test_inside_of_a_forward_pass_base_model_is_the_model_without_its_head() -> None:
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**SIZES)), LoraConfig(r=2))
    seen = []
    model.model.layers[0].register_forward_hook(lambda *_: seen.append(model.base_model))
    model(torch.ones(1, 2, dtype=torch.long))
    assert seen == [model.model]
    assert model.base_model.model is model


@pytest.mark.parametrize(
    ("method", "options", "name"),
    [
        ("VBLoRA", {"vector_length": 1, "num_vectors": 4}, "vblora_vector_bank"),
        ("UniLora", {}, "unilora_theta_d"),
        ("Vera", {}, "vera_A"),
        ("RandLora", {"r": 2}, "randlora_B"),
    ],
)
def test_tensors_that_layers_share_are_attributes_as_in_peft(method: str, options: dict[str, int], name: str) -> None:
    models = []
    for library in (peftcore, peft):
        config = getattr(library, f"{method}Config")(target_modules=["0", "2"], **options)
        models.append(library.get_peft_model(base(), config))
    config = getattr(peftcore, f"{method}Config")(target_modules=["0", "2"], **options)
    ours, theirs = (getattr(model.base_model, name) for model in models)
    assert list(ours) == ["default"] and ours["default"].shape == theirs["default"].shape
    assert getattr(models[0], name)["default"] is ours["default"]
    held = getattr(models[0], name)
    models[0].add_adapter("other", config)
    assert list(held) == ["default", "other"]
    models[0].delete_adapter("other")
    assert list(held) == ["default"] and "other" not in held
    other = base()
    assert not hasattr(get_peft_model(other, LoraConfig(r=2, target_modules=["0"])), name)
    other.unload().register_buffer(name, own := torch.ones(1))
    assert getattr(get_peft_model(other, config), name) is own, "the model's own attribute comes first"
    assert getattr(models[0][0], name)["default"] is ours["default"] is getattr(models[0][2], name).default
    with pytest.raises(AttributeError, match="vera_C"):
        _ = models[0].base_model.vera_C
    with pytest.raises(AttributeError, match="vera_C"):
        _ = models[0][0].vera_C


@pytest.mark.parametrize("lib", [peftcore, peft])
def test_a_configuration_that_a_script_sets_is_injected(lib: Any) -> None:
    model = lib.get_peft_model(nn.Sequential(nn.Linear(4, 4)), lib.LoraConfig(target_modules=["0"]))
    model.base_model.peft_config["b"] = lib.LoraConfig(target_modules=["0"], r=2)
    model.base_model.inject_adapter(model.base_model.model, "b")
    assert list(model.peft_config) == ["default", "b"] and model.active_adapters == ["default"]
    assert dict(model.base_model.model[0].r) == {"default": 8, "b": 2}
    assert {name.split(".")[-2] for name, one in model.named_parameters() if one.requires_grad} == {"default"}
    model.set_adapter("b")
    assert {name.split(".")[-2] for name, one in model.named_parameters() if one.requires_grad} == {"b"}


def test_only_a_configuration_without_an_adapter_is_injected() -> None:
    model: Any = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
    with pytest.raises(AdapterNameError, match="'default' is loaded already; take another name"):
        model.base_model.inject_adapter(model, "default")
    with pytest.raises(AdapterNameError, match="Adapter b does not exist"):
        model.base_model.inject_adapter(model, "b")
    model.peft_config["b"] = LoraConfig(target_modules=["no"])
    with pytest.raises(TargetError):
        model.base_model.inject_adapter(model, "b")
    assert list(model.peft_config) == ["default"]
