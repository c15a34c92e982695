"""HF PEFT's classes answer `isinstance` for peftcore's models and layers as they do for HF PEFT's."""

from pathlib import Path

import peft
import pytest
from peftcore.tuners.adalora.layer import AdaLoraLayer, SVDConv2d, SVDLinear
from peftcore.tuners.ia3.layer import IA3Layer
from peftcore.tuners.lora import Embedding, Linear, LoraLayer
from peftcore.tuners.lycoris_utils import LycorisLayer
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
        "1.adapters.default.lora_A",
        "1.adapters.default.lora_B",
    ]


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
