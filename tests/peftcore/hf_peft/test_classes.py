"""HF PEFT's classes answer `isinstance` for peftcore's models and layers as they do for HF PEFT's."""

import importlib
import sys
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
from peft.tuners import tuners_utils
from peft.tuners.tuners_utils import BaseTunerLayer
from peftcore.tuners.adalora.layer import AdaLoraLayer, SVDConv2d, SVDLinear
from peftcore.tuners.ia3.layer import IA3Layer
from peftcore.tuners.lora import Embedding, Linear, LoraLayer
from peftcore.tuners.lycoris_utils import LycorisConfig, LycorisLayer, LycorisTuner
from torch import nn

import peftcore
from peftcore import (
    AdaLoraConfig,
    ConfigError,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftConfig,
    PeftError,
    get_peft_model,
)
from peftcore.hf_peft import classes


def base() -> nn.Sequential:
    return nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))


def test_layers() -> None:
    model = get_peft_model(base(), LoraConfig(target_modules=["0", "1"], modules_to_save=["3"]))
    embedding, linear, relu, head = model
    assert isinstance(linear, LoraLayer) and isinstance(linear, Linear) and not isinstance(linear, Embedding)
    assert isinstance(embedding, Embedding) and not isinstance(embedding, Linear)
    assert not isinstance(linear, IA3Layer)
    assert isinstance(linear, classes.BaseTunerLayer) and not isinstance(relu, classes.BaseTunerLayer)
    assert isinstance(head, classes.ModulesToSaveWrapper) and not isinstance(head, classes.BaseTunerLayer)
    assert not isinstance(linear, classes.AuxiliaryTrainingWrapper)
    assert issubclass(type(linear), classes.BaseTunerLayer)


def test_a_layer_of_several_methods_is_a_layer_of_each() -> None:
    model = get_peft_model(base(), LoraConfig(target_modules=["1", "3"]), mixed=True)
    model.add_adapter("other", IA3Config(target_modules=["1"], feedforward_modules=[]))
    assert isinstance(model[1], LoraLayer) and isinstance(model[1], IA3Layer)
    assert isinstance(model[3], LoraLayer) and not isinstance(model[3], IA3Layer)


def test_layers_of_adalora_are_layers_of_lora_but_not_its_linear_layers() -> None:
    layer = get_peft_model(base(), AdaLoraConfig(target_modules=["1"], total_step=9))[1]
    assert isinstance(layer, LoraLayer) and isinstance(layer, AdaLoraLayer) and not isinstance(layer, Linear)
    plain = get_peft_model(base(), LoraConfig(target_modules=["1"]))[1]
    assert isinstance(plain, LoraLayer) and not isinstance(plain, AdaLoraLayer)
    assert issubclass(peft.tuners.adalora.AdaLoraLayer, peft.tuners.lora.LoraLayer)  # as in HF PEFT


def test_the_parameters_of_lora_layers_can_be_selected() -> None:
    model = get_peft_model(base(), LoraConfig(target_modules=["1"]))
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert len(layers) == 1
    assert [name for name, _ in model.named_parameters() if "lora_" in name] == [
        "1.lora_A.default.weight",
        "1.lora_B.default.weight",
    ]


def test_the_class_of_a_layer_says_how_its_weight_is_stored_and_shaped() -> None:
    lora, ia3 = peftcore.tuners.lora, peftcore.tuners.ia3
    model = nn.Sequential(
        nn.Linear(64, 64),
        bnb.nn.Linear4bit(64, 64, quant_type="nf4"),
        bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False),
        nn.Conv1d(64, 8, 1),
        nn.Conv2d(64, 8, 1),
    )
    model[1].weight = bnb.nn.Params4bit(torch.ones(64, 64), requires_grad=False, quant_type="nf4")
    model[2].weight = bnb.nn.Int8Params(torch.ones(64, 64), requires_grad=False, has_fp16_weights=False)
    model = get_peft_model(model.to("cpu"), LoraConfig(target_modules=["0", "1", "2", "3", "4"]))
    names = ("Linear", "Linear4bit", "Linear8bitLt", "Conv1d", "Conv2d", "GPTQLoraLinear")
    found = [[name for name in names if isinstance(layer, getattr(lora, name))] for layer in model]
    assert found == [["Linear"], ["Linear4bit"], ["Linear8bitLt"], ["Conv1d"], ["Conv2d"]]
    assert not any(isinstance(layer, ia3.Linear4bit) for layer in model)
    model.add_adapter("other", IA3Config(target_modules=["0", "1"], feedforward_modules=[]))
    assert isinstance(model[1], ia3.bnb.Linear4bit) and not isinstance(model[1], ia3.Linear)
    assert isinstance(model[0], ia3.Linear) and not isinstance(model[0], ia3.Linear4bit)


def _layer_classes() -> list[tuple[str, str]]:
    """(module, class) of HF PEFT's layers, except those that are no kind of layer here."""
    names = ("awq", "bnb", "gptq", "hqq", "layer")
    modules = {path for path in sys.modules if path.startswith("peft.tuners.") and path.rpartition(".")[2] in names}
    return [
        (path, name)
        for path in sorted(modules)
        for name, value in vars(sys.modules[path]).items()
        if isinstance(value, type) and issubclass(value, BaseTunerLayer) and value.__module__ == path
        if not name.startswith("_") and name not in ("MultiheadAttention", "XLoraLayer")
    ]


@pytest.mark.parametrize(("module", "name"), _layer_classes())
def test_every_layer_class_of_hf_peft_can_be_asked_for(module: str, name: str) -> None:
    ours = getattr(importlib.import_module(module.replace("peft.", "peftcore.", 1)), name)
    assert not isinstance(nn.Linear(2, 2), ours)
    assert ours.adapter_layer_names == getattr(sys.modules[module], name).adapter_layer_names


def test_wrappers_name_the_attributes_with_parameters() -> None:
    for ours in (classes.BaseTunerLayer, classes.AuxiliaryTrainingWrapper, classes.ModulesToSaveWrapper):
        theirs = getattr(tuners_utils, ours.__name__, None) or getattr(peft.utils.other, ours.__name__)
        assert ours.adapter_layer_names == theirs.adapter_layer_names
    theirs = peft.utils.other.TrainableTokensWrapper
    assert classes.TrainableTokensWrapper.adapter_layer_names == theirs.adapter_layer_names


def test_a_layer_class_cannot_be_made_by_itself() -> None:
    with pytest.raises(PeftError, match="made by get_peft_model"):
        Linear(nn.Linear(2, 2), "default")


def test_task_classes() -> None:
    model = get_peft_model(base(), LoraConfig(target_modules=["1"], task_type="CAUSAL_LM"))
    assert isinstance(model, peftcore.PeftModelForCausalLM)
    assert not isinstance(model, peftcore.PeftModelForSeq2SeqLM)
    assert not isinstance(base(), peftcore.PeftModelForCausalLM)
    made = peftcore.PeftModelForTokenClassification(base(), LoraConfig(target_modules=["1"]))
    assert isinstance(made, peftcore.PeftModelForTokenClassification)
    with pytest.raises(ConfigError, match="task_type must be 'SEQ_CLS' or None"):
        peftcore.PeftModelForSequenceClassification(base(), LoraConfig(target_modules=["1"], task_type="CAUSAL_LM"))


def test_a_model_of_several_methods_is_mixed() -> None:
    model = get_peft_model(base(), LoraConfig(target_modules=["1"]))
    assert not isinstance(model, peftcore.PeftMixedModel)
    model.add_adapter("other", IA3Config(target_modules=["1"], feedforward_modules=[]))
    assert isinstance(model, peftcore.PeftMixedModel)


def test_prompts() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))
    config = peftcore.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    learners = [
        type(m).__name__ for m in get_peft_model(model, config).modules() if isinstance(m, classes.PromptEmbedding)
    ]
    assert learners == ["PromptTuning"]
    assert not any(isinstance(module, classes.PrefixEncoder) for module in model.modules())


def test_directories_with_an_adapter(tmp_path: Path) -> None:
    directory = tmp_path / "adapter"
    get_peft_model(base(), LoraConfig(target_modules=["1"])).save_pretrained(directory)
    assert classes.check_if_peft_model(str(directory))
    assert not classes.check_if_peft_model(str(tmp_path))


def test_rows_that_train_beside_another_method_are_a_wrapper() -> None:
    def net() -> nn.Module:
        return nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 3))

    beside = get_peft_model(net(), LoraConfig(target_modules=["1"], trainable_token_indices={"0": [1]}))
    alone = get_peft_model(net(), peftcore.TrainableTokensConfig(target_modules=["0"], token_indices=[1]))
    assert [isinstance(layer, classes.TrainableTokensWrapper) for layer in beside] == [True, False]
    assert not isinstance(alone[0], classes.TrainableTokensWrapper)


def test_layers_of_loha_and_lokr_are_lycoris_layers_and_adaloras_are_svd_linear() -> None:
    def layer(config: PeftConfig) -> nn.Module:
        return get_peft_model(nn.Sequential(nn.Linear(4, 4)), config).get_submodule("0")

    loha, lokr = layer(LoHaConfig(target_modules=["0"], r=2)), layer(LoKrConfig(target_modules=["0"], r=2))
    adalora = layer(AdaLoraConfig(target_modules=["0"], init_r=2, target_r=1, total_step=9))
    assert isinstance(loha, LycorisLayer) and isinstance(lokr, LycorisLayer) and not isinstance(adalora, LycorisLayer)
    assert isinstance(adalora, SVDLinear) and not isinstance(adalora, SVDConv2d) and not isinstance(loha, SVDLinear)


@pytest.mark.parametrize("kind", [LoHaConfig, LoKrConfig, LoraConfig])
def test_configurations_and_views_of_loha_and_lokr_are_of_lycoris(kind: Any) -> None:
    config = kind(target_modules=["0"], r=2)
    view = get_peft_model(nn.Sequential(nn.Linear(4, 4)), config).base_model
    is_lycoris = kind is not LoraConfig
    assert isinstance(config, LycorisConfig) == issubclass(kind, LycorisConfig) == is_lycoris
    assert isinstance(view, LycorisTuner) == is_lycoris


@pytest.mark.parametrize("kind", [Linear, LoraLayer, classes.BaseTunerLayer, classes.ModulesToSaveWrapper])
def test_a_method_that_would_never_be_called_cannot_be_set_on_a_class_of_layers(kind: type) -> None:
    with pytest.raises(PeftError, match=r"\.forward cannot be set, because peftcore never calls it"):
        kind.forward = lambda self, x: x  # type: ignore[attr-defined]
    kind.patched = True  # type: ignore[attr-defined]
    del kind.patched  # type: ignore[attr-defined]


def test_a_subclass_of_a_task_class_cannot_be_made(tmp_path: Path) -> None:
    class Own(peftcore.PeftModelForCausalLM):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    for make in (lambda: Own(base(), LoraConfig(target_modules=["0"])), lambda: Own.from_pretrained(base(), tmp_path)):
        with pytest.raises(PeftError, match="Own cannot be made: PeftModelForCausalLM is no base class"):
            make()
