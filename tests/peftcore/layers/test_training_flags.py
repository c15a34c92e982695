"""Adapters are in training or evaluation mode as with HF PEFT, and whoever changes the mode puts it back."""

import copy
from typing import Any

import peft
import pytest
import torch
from method_example import examples
from torch import nn

import peftcore
from peftcore import LoraConfig, get_peft_model
from peftcore.injection.start_from_data import initialize_from_data

EXAMPLES = {method: example for method, example in examples().items() if not example.whole_model}
DROPOUTS = {
    "LORA": {"lora_dropout": 0.5},
    "ADALORA": {"lora_dropout": 0.5},
    "BOFT": {"boft_dropout": 0.5},
    "DEFT": {"deft_dropout": 0.5},
    "DELORA": {"module_dropout": 0.5},
    "FROD": {"frod_dropout": 0.5},
    "GRALORA": {"gralora_dropout": 0.5},
    "HIRA": {"hira_dropout": 0.5},
    "LOHA": {"rank_dropout": 0.5},
    "LOKR": {"rank_dropout": 0.5},
    "MISS": {"miss_dropout": 0.5},
    "OFT": {"module_dropout": 0.5},
    "PSOFT": {"psoft_dropout": 0.5},
    "PVERA": {"pvera_dropout": 0.5},
    "RANDLORA": {"randlora_dropout": 0.5},
    "SUPERTUNING": {"lora_dropout": 0.5},
    "UNILORA": {"unilora_dropout": 0.5},
    "TINYLORA": {"tinylora_dropout": 0.5},
    "VBLORA": {"vblora_dropout": 0.5},
    "VERA": {"vera_dropout": 0.5},
}


def base() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8), nn.Dropout(0.5)).eval()


def drops(net: nn.Module) -> bool:
    """Whether two forwards of the same input differ."""
    torch.manual_seed(1)
    x = torch.ones(20, 12)
    outputs = [net(x).detach() for _ in range(4)]
    return any(not torch.equal(y, outputs[0]) for y in outputs)


def move(net: nn.Module) -> None:
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))


@pytest.mark.parametrize("method", DROPOUTS)
def test_dropout_acts_at_once_on_a_base_in_evaluation_mode_and_the_base_stays_there(method: str) -> None:
    config = EXAMPLES[method].make(target_modules=["0"], **DROPOUTS[method])
    net = get_peft_model(base(), config)
    move(net)
    assert drops(net) and not net[0].base_layer.training and not net[1].training
    assert not drops(net.eval())
    net.add_adapter("other", config)
    net.set_adapter("other")
    move(net)
    assert drops(net)
    net.set_adapter("default")
    assert not drops(net)


def test_flags_are_those_of_peft(tmp_path: Any) -> None:
    def flags(net: Any, tool: Any, names: list[str]) -> list[bool]:
        if tool is peftcore:
            host = net.get_submodule("0")
            adapters = [host.adapters[name].training for name in names]
            plain = net.get_submodule("1")
        else:
            host = net.get_submodule("base_model.model.0")
            adapters = [host.lora_dropout[name].training for name in names]
            plain = net.get_submodule("base_model.model.1")
        return [*adapters, host.base_layer.training, plain.training]

    found: dict[Any, list[list[bool]]] = {peftcore: [], peft: []}
    for tool, seen in found.items():
        folder = str(tmp_path / tool.__name__)
        config = tool.LoraConfig(r=2, lora_dropout=0.5, target_modules=["0"])
        net = tool.get_peft_model(base(), copy.deepcopy(config))
        seen.append(flags(net, tool, ["default"]))
        net.save_pretrained(folder)
        net = tool.PeftModel.from_pretrained(base(), folder, is_trainable=True)
        seen.append(flags(net, tool, ["default"]))
        net.eval()
        net.load_adapter(folder, "trains", is_trainable=True)
        seen.append(flags(net, tool, ["default", "trains"]))
        net.add_adapter("added", copy.deepcopy(config))
        seen.append(flags(net, tool, ["default", "trains", "added"]))
        net.train()
        net.load_adapter(folder, "frozen")
        seen.append(flags(net, tool, ["default", "trains", "added", "frozen"]))
        net = tool.PeftModel.from_pretrained(base().train(), folder)
        seen.append(flags(net, tool, ["default"]))
    assert found[peftcore] == found[peft]


def test_a_start_from_data_leaves_every_module_in_its_mode() -> None:
    net = get_peft_model(base(), LoraConfig(r=2, target_modules=["0"], init_lora_weights="eva", eva_config={}))
    before = {name: module.training for name, module in net.named_modules()}
    batches = [{"x": torch.randn(30, 12)} for _ in range(3)]
    initialize_from_data(net, batches, forward=lambda model, batch: model(batch["x"]), progress=False)
    assert {name: module.training for name, module in net.named_modules()} == before
