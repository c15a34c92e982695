"""`LoraModel`, `IA3Model`, ...: one class for each method that adapts layers."""

import subprocess
import sys
from typing import Any

import peft
import pytest
import torch
from torch import nn

import peftcore
from peftcore import LoraConfig, PeftConfig, PeftError, get_peft_model
from peftcore.injection import tuner_models
from peftcore.injection.tuner_model import TunerModel

CLASSES = {
    name: kind
    for name, kind in vars(tuner_models).items()
    if isinstance(kind, type) and issubclass(kind, TunerModel) and kind is not TunerModel
}


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_is_of_the_method_that_has_its_name_in_hf_peft(name: str) -> None:
    methods = {method.value for method, kind in peft.PEFT_TYPE_TO_TUNER_MAPPING.items() if kind is getattr(peft, name)}
    assert methods == {CLASSES[name].peft_type}
    assert getattr(peftcore, name) is CLASSES[name]


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (peftcore.LoraModel, peftcore.LoraConfig(target_modules=["0"])),
        (peftcore.IA3Model, peftcore.IA3Config(target_modules=["0"], feedforward_modules=[])),
        (peftcore.HRAModel, peftcore.HRAConfig(r=2, target_modules=["0"])),
        (peftcore.LNTuningModel, peftcore.LNTuningConfig(target_modules=["1"])),
    ],
    ids=lambda case: case.method if isinstance(case, PeftConfig) else "",
)
def test_base_model_is_of_the_class_of_the_models_method(kind: type[TunerModel], config: PeftConfig) -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), config)
    assert type(model.base_model) is kind


def test_with_adapters_of_several_methods_the_first_one_decides() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), peftcore.HRAConfig(r=2, target_modules=["0"]))
    model.add_adapter("other", LoraConfig(target_modules=["0"]))
    assert type(model.base_model) is peftcore.HRAModel
    with pytest.warns(UserWarning, match="'other' is the active one now"):
        model.delete_adapter("default")
    assert type(model.base_model) is peftcore.LoraModel


def test_a_class_called_on_a_model_adds_an_adapter_of_its_method() -> None:
    base = nn.Sequential(nn.Linear(4, 3))
    x = torch.randn(2, 4)
    expected = base(x)
    config = peftcore.IA3Config(target_modules=["0"], feedforward_modules=[], init_ia3_weights=False)
    tuner = peftcore.IA3Model(base, config, "mine")
    assert tuner.active_adapters == ["mine"] and tuner.prefix == "ia3_"
    assert not torch.equal(base(x), expected)
    tuner.delete_adapter("mine")
    assert torch.equal(base(x), expected)


def test_tinyloras_vectors_can_be_drawn_again() -> None:
    config = peftcore.TinyLoraConfig(target_modules=["0"], init_v_bound=0.5, u=300)
    model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), config)
    model.base_model._init_tinylora_v(config, "default")  # type: ignore[operator]
    (vector,) = (parameter for parameter in model.parameters() if parameter.requires_grad)
    assert 0.4 < vector.abs().max() <= 0.5


@pytest.mark.parametrize("only_topk", [True, False])
def test_vbloras_saved_numbers_are_counted_as_in_hf_peft(only_topk: bool, capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for library in (peft, peftcore):
        config = library.VBLoRAConfig(
            target_modules=["0"],
            modules_to_save=["1"],
            num_vectors=300,
            vector_length=4,
            topk=3,
            save_only_topk_weights=only_topk,
        )
        model = library.get_peft_model(nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 2)), config)
        model.print_savable_parameters()  # type: ignore[operator]
        printed.append((model.get_nb_savable_parameters(), capsys.readouterr().out))  # type: ignore[operator]
    assert printed[0] == printed[1]


def test_base_model_has_the_class_of_its_method_without_an_import_of_that_class() -> None:
    script = """
from peftcore import VBLoRAConfig, get_peft_model
from torch import nn

model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), VBLoRAConfig(target_modules=["0"], vector_length=4))
model.print_savable_parameters()
print(type(model.base_model).__name__)
"""
    output = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert "params to-be-saved" in output and output.endswith("VBLoRAModel\n")


def test_adalora_is_updated_by_the_model_or_by_its_base_model() -> None:
    results = []
    for through_model in (True, False):
        torch.manual_seed(0)
        config = peftcore.AdaLoraConfig(target_modules=["0"], init_r=4, target_r=1, total_step=4)
        model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), config)
        model(torch.randn(2, 8)).square().sum().backward()
        (model if through_model else model.base_model).update_and_allocate(4)  # type: ignore[operator]
        results.append(model.adapter_ranks())
    assert results[0] == results[1] == {"0": 1}


def test_a_model_has_only_the_methods_of_its_own_method() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
    assert not hasattr(model, "print_savable_parameters")


def test_methods_by_which_hf_peft_makes_layers_are_refused() -> None:
    class Own(peftcore.LoraModel):
        def _create_new_module(self) -> None:
            pass

    plain, config = nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"])
    with pytest.raises(PeftError, match="Own cannot be made, because it defines _create_new_module"):
        Own(plain, config)
    with pytest.raises(PeftError, match=r"LoraModel\._create_and_replace cannot be set: peftcore never calls it"):
        peftcore.LoraModel._create_and_replace = None  # type: ignore[attr-defined]
    assert type(plain[0]) is nn.Linear


@pytest.mark.parametrize("library", [peftcore, peft])
def test_only_adapters_train_after_the_base_was_unfrozen(library: Any) -> None:
    options: dict[str, Any] = {"r": 2, "target_modules": ["0"], "bias": "lora_only", "modules_to_save": ["1"]}
    model = library.get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), library.LoraConfig(**options))
    model.add_adapter("frozen", library.LoraConfig(r=2, target_modules=["0"], inference_mode=True))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("frozen" not in name)
    model.base_model._mark_only_adapters_as_trainable(model.base_model.model)
    names = {name.removeprefix("base_model.model.") for name, p in model.named_parameters() if p.requires_grad}
    assert {"0.lora_A.default.weight", "0.lora_B.default.weight", "1.modules_to_save.default.weight"} < names
    assert not any("frozen" in name or name.endswith("0.base_layer.weight") for name in names)


def test_other_methods_of_a_subclass_are_its_own() -> None:
    class Own(peftcore.LoraModel):
        def names(self) -> list[str]:
            return self.targeted_module_names

    plain, config = nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"])
    assert Own(plain, config).names() == ["0"]
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)
    assert type(model.base_model) is peftcore.LoraModel
    try:
        peftcore.LoraModel.layers = lambda self: "set"  # type: ignore[attr-defined]
        assert model.base_model.layers() == "set"  # type: ignore[operator]
    finally:
        del peftcore.LoraModel.layers  # type: ignore[attr-defined]


@pytest.mark.parametrize("library", ["axolotl.loaders.adapter", "swift.tuners.peft"])
def test_what_a_library_sets_on_the_models_to_mend_hf_peft_has_no_effect(library: str) -> None:
    def hook(*args: Any) -> None:
        raise AssertionError("it was called")

    hook.__module__ = library
    own: Any = peftcore.LoraModel
    make = own._create_and_replace
    own._create_and_replace = own._cast_adapter_dtype = hook
    peftcore.AdaLoraModel.forward = hook  # type: ignore[method-assign]
    assert isinstance(own(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"])), own)
    with pytest.raises(PeftError, match=r"LoraModel\._create_and_replace makes layers of HF PEFT"):
        make()
