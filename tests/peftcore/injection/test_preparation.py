"""An adapter is made and checked before the model is touched."""

import contextlib
import copy
import json
import types
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from net import Net
from torch import nn
from transformers.pytorch_utils import Conv1D

import peftcore
from peftcore import (
    AdapterNameError,
    ConfigError,
    LoHaConfig,
    LoraConfig,
    TrainableTokensConfig,
    get_peft_model,
)
from peftcore.injection.adapter_set import ATTRIBUTE
from peftcore.injection.preparation import prepare_injection

CONFIG = LoraConfig(r=2, target_modules=["target"])


def test_the_model_is_not_touched() -> None:
    net = Net(nn.Linear(6, 4))
    target = net.target
    injection = prepare_injection(net, CONFIG, "a")
    assert net.target is target and target.weight.requires_grad and ATTRIBUTE not in vars(net)
    assert list(injection.adapters) == ["target"] and injection.adapters["target"].lora_A_weight.shape == (2, 6)


@pytest.mark.parametrize(
    ("base", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
    ids=str,
)
def test_parameters_are_in_float32_or_wider(base: torch.dtype, expected: torch.dtype) -> None:
    injection = prepare_injection(Net(nn.Linear(6, 4).to(base)), CONFIG, "a")
    assert {parameter.dtype for parameter in injection.adapters["target"].parameters()} == {expected}


def test_tied_copies_stay_tied() -> None:
    net: Any = nn.ModuleDict(
        {"embed": nn.Embedding(5, 4), "target": nn.Linear(4, 4), "head": nn.Linear(4, 5, bias=False)}
    )
    net["head"].weight = net["embed"].weight
    config = LoraConfig(target_modules=["target"], modules_to_save=["embed"], ensure_weight_tying=True)
    copies: Any = prepare_injection(net, config, "a").copies
    assert set(copies) == {"embed", "head"} and copies["embed"].weight is copies["head"].weight
    assert copies["embed"].weight is not net["embed"].weight


class Tied(nn.ModuleDict):
    """An embedding and a head with one weight, and another layer."""

    def __init__(self, **config: Any) -> None:
        layers = {"embed": nn.Embedding(5, 4), "target": nn.Linear(4, 4), "head": nn.Linear(4, 5, bias=False)}
        super().__init__(layers)
        self["head"].weight = self["embed"].weight
        self.config = types.SimpleNamespace(**config)


@pytest.mark.parametrize("part", ["embed", "head"])
def test_an_adapter_that_unties_a_weight_warns(part: str) -> None:
    targeted: dict[str, Any] = {"target_modules": ["target", part]}
    copied: dict[str, Any] = {"target_modules": ["target"], "modules_to_save": [part]}
    for options in (targeted, copied):
        with pytest.warns(UserWarning, match="embed and head share a weight.*set ensure_weight_tying=True"):
            get_peft_model(Tied(), LoraConfig(**options))
        get_peft_model(Tied(), LoraConfig(ensure_weight_tying=True, **options))
    with pytest.warns(UserWarning, match="no implementation exists to tie the adapters of LOHA"):
        get_peft_model(Tied(), LoHaConfig(**copied))
    get_peft_model(Tied(), LoraConfig(target_modules=["target"]))
    get_peft_model(Tied(), TrainableTokensConfig(token_indices=[1], target_modules=["embed"]))


def test_a_model_that_says_that_it_is_not_tied_is_not_tied() -> None:
    config = LoraConfig(target_modules=["target", "head"], ensure_weight_tying=True)
    with pytest.warns(UserWarning, match="has no effect: no tied modules were found.*tie_word_embeddings=False"):
        injection = prepare_injection(Tied(tie_word_embeddings=False), config, "a")
    assert set(injection.adapters) == {"target", "head"} and config.ensure_weight_tying
    get_peft_model(Tied(tie_word_embeddings=False), LoraConfig(target_modules=["head"]))


@pytest.mark.parametrize("name", ["", "a.b", "a/b"])
def test_names_that_cannot_be_part_of_a_path_are_refused(name: str) -> None:
    with pytest.raises(AdapterNameError, match=r"must not be empty or contain '\.' or '/'"):
        prepare_injection(Net(nn.Linear(6, 4)), CONFIG, name)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is:DeprecationWarning")  # inside of torch.compile
def test_a_taken_name_and_a_compiled_model_are_refused() -> None:
    model = get_peft_model(Net(nn.Linear(6, 4)), CONFIG, "a")
    with pytest.raises(AdapterNameError, match="already an adapter named 'a'"):
        prepare_injection(model, CONFIG, "a")
    with pytest.raises(ConfigError, match=r"attached before torch\.compile"):
        prepare_injection(torch.compile(Net(nn.Linear(6, 4))), CONFIG, "a")  # type: ignore[arg-type]


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_a_raw_parameter_trains_beside_the_bias_of_its_layer(bias: Any) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).double()
    x, own, other = torch.randn(3, 6).double(), *base
    before = own.bias.detach().clone(), other.bias.detach().clone()
    config = LoraConfig(r=2, target_modules=["1"], target_parameters=["0.weight"], bias=bias, init_lora_weights=False)
    net = get_peft_model(base, config)
    changes = [net[0].get_delta_weight("default"), net[1].get_delta_weight("default")]
    trained = [p for name, p in net.named_parameters() if p.requires_grad and name.endswith("bias")]
    assert len(trained) == (0 if bias == "none" else 2)
    with torch.no_grad():
        for parameter in trained:
            parameter += 0.1
    shift = 0.1 if trained else 0.0
    h = x @ (own.weight + changes[0]).T + before[0] + shift
    expected = h @ (other.weight + changes[1]).T + before[1] + shift
    torch.testing.assert_close(net(x), expected)
    net.merge_adapter()
    torch.testing.assert_close(net(x), expected)


def test_token_rows_beside_a_raw_parameter_of_one_layer_are_refused() -> None:
    net = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 6))
    config = LoraConfig(target_modules=["1"], target_parameters=["0.weight"], trainable_token_indices={"0": [1]})
    with pytest.raises(ConfigError, match="trainable_token_indices: 0 is a target itself"):
        get_peft_model(net, config)
    assert ATTRIBUTE not in vars(net)


@pytest.mark.parametrize("config", [LoraConfig, LoHaConfig])
def test_keys_of_patterns_that_match_no_layer_are_named(config: Any) -> None:
    options: dict[str, Any] = {"r": 2, "target_modules": ["target"], "rank_pattern": {"target": 3, "tarquet": 4}}
    with pytest.warns(RuntimeWarning, match="rank_pattern: tarquet match no adapted layer and have no effect"):
        injection = prepare_injection(Net(nn.Linear(6, 4)), config(**options), "a")
    assert sum(p.numel() for p in injection.adapters["target"].parameters()) % 3 == 0


@pytest.mark.parametrize("stated", [False, True])
@pytest.mark.parametrize("method", ["LoraConfig", "IA3Config", "VeraConfig"])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set:UserWarning")  # HF PEFT
def test_the_orientation_is_saved_as_in_hf_peft(method: str, stated: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {"target_modules": ["0"], "fan_in_fan_out": stated}
    options |= {"feedforward_modules": []} if method == "IA3Config" else {}
    for layer in (Conv1D(6, 4), nn.Linear(4, 6)):
        is_conv1d, saved = isinstance(layer, Conv1D), []
        for library in (peftcore, peft):
            warns = library is peftcore and stated and not is_conv1d
            config = getattr(library, method)(**options)
            with pytest.warns(UserWarning, match="no effect, because none") if warns else contextlib.nullcontext():
                model = library.get_peft_model(nn.Sequential(copy.deepcopy(layer)), config)
            model.save_pretrained(str(tmp_path))
            saved.append(json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"])
            assert library is peft or config.fan_in_fan_out is stated, "the user's configuration stays as it is"
        assert saved == [is_conv1d, is_conv1d] and model.peft_config["default"].fan_in_fan_out is is_conv1d
