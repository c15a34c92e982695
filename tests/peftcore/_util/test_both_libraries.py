"""Objects of HF PEFT in peftcore's functions: an error that names both libraries and says what to do."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import peftcore
from peftcore.hf_peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

NET = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
THEIRS = peft.LoraConfig(target_modules=["0"])
OURS = peftcore.LoraConfig(target_modules=["0"])


def net() -> nn.Sequential:
    return copy.deepcopy(NET)


def their_model() -> Any:
    return peft.get_peft_model(net(), copy.deepcopy(THEIRS))


def our_model() -> Any:
    return peftcore.get_peft_model(net(), OURS)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved") / "adapter"
    our_model().save_pretrained(directory)
    return directory


CALLS: dict[str, Callable[[Path], Any]] = {
    "a configuration for get_peft_model": lambda _: peftcore.get_peft_model(net(), THEIRS),  # type: ignore[arg-type]
    "a configuration for PeftModel": lambda _: peftcore.PeftModel(net(), THEIRS),
    "a configuration for add_adapter": lambda _: our_model().add_adapter("other", THEIRS),
    "a configuration for add_adapter of transformers": lambda _: our_model().add_adapter(THEIRS),
    "a configuration for injection": lambda _: peftcore.inject_adapter_in_model(THEIRS, net()),  # type: ignore[arg-type]
    "a configuration for loading": lambda d: peftcore.PeftModel.from_pretrained(net(), d, config=THEIRS),  # type: ignore[arg-type]
    "a model for get_peft_model": lambda _: peftcore.get_peft_model(their_model(), OURS),
    "the base of their model": lambda _: peftcore.get_peft_model(their_model().base_model.model, OURS),
    "a model for loading": lambda d: peftcore.PeftModel.from_pretrained(their_model(), d),
    "a model for its state dict": lambda _: peftcore.get_peft_model_state_dict(their_model()),
    "a model for set_peft_model_state_dict": lambda _: peftcore.set_peft_model_state_dict(their_model(), {}),
    "a model for the conversion": lambda _: peftcore.convert_to_lora(their_model()),
    "a model for the exchange": lambda d: hotswap_adapter(their_model(), d, "default"),
    "a model for the preparation": lambda _: prepare_model_for_compiled_hotswap(their_model()),
    "a model for its status": lambda _: peftcore.get_layer_status(their_model()),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_the_error_names_both_libraries(call: Callable[[Path], Any], saved: Path) -> None:
    with pytest.raises(peftcore.PeftError, match=r"HF PEFT.* a peft\..*`import peftcore\.as_peft`"):
        call(saved)


def test_a_derived_configuration_is_theirs() -> None:
    class Own(peft.LoraConfig):
        pass

    with pytest.raises(peftcore.ConfigError, match="HF PEFT"):
        peftcore.get_peft_model(net(), Own())  # type: ignore[arg-type]


def test_a_base_that_hf_peft_gave_back_is_a_plain_model() -> None:
    x = torch.randn(2, 4)
    model = peftcore.get_peft_model(their_model().unload(), OURS)
    torch.testing.assert_close(model(x), NET(x))
