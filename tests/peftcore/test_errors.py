"""Classes of errors, and the refusal of a feature whose optional packages are missing."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import peftcore
from peftcore.errors import MissingExtraError, PeftError, require_extra
from peftcore.methods.lora.variants.loftq import _quantised
from tests.peftcore.support.lora_nets import llama

LORA = peftcore.LoraConfig(target_modules=["q_proj"])


def test_what_is_installed_is_not_imported() -> None:
    before = set(sys.modules)
    require_extra("train", "peftcore.train", "json", "this")
    assert set(sys.modules) - before == set()


def test_the_message_names_what_is_missing_and_the_command() -> None:
    with pytest.raises(MissingExtraError) as refusal:
        require_extra("serve", "peftcore.serving", "json", "no_such_a", "no_such_b")
    told = str(refusal.value)
    assert told == "peftcore.serving needs no_such_a, no_such_b; install with: pip install 'peftcore[serve]'"
    assert isinstance(refusal.value, PeftError) and isinstance(refusal.value, ImportError)


def test_a_long_list_is_cut() -> None:
    with pytest.raises(MissingExtraError, match="needs x0, x1, x2, x3 and 3 more packages; install"):
        require_extra("pipeline", "the command", *(f"x{i}" for i in range(7)))


@pytest.mark.parametrize(
    ("module", "package", "extra"),
    [
        ("peftcore.train", "accelerate", "train"),
        ("peftcore.serving", "uvicorn", "serve"),
        ("peftcore.export", "gguf", "export"),
    ],
)
def test_a_package_without_its_extra(module: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftcore.errors.find_spec", lambda name: None if name == package else object())
    for name in [name for name in sys.modules if name == module or name.startswith(f"{module}.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(MissingExtraError, match=rf"^{module} needs {package}; .*'peftcore\[{extra}\]'$"):
        importlib.import_module(module)


def test_loftq_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftcore.errors.find_spec", lambda name: None)
    with pytest.raises(
        MissingExtraError, match=r"^init_lora_weights='loftq' needs bitsandbytes; .*'peftcore\[quant\]'$"
    ):
        _quantised(torch.ones(4, 4), bits=4)
    assert torch.equal(_quantised(torch.ones(4, 4), bits=8), torch.ones(4, 4)), "int8 needs no package"


def test_errors_are_also_of_the_classes_that_hf_peft_raises(tmp_path: Path) -> None:
    prompt = peftcore.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model, prompted = (peftcore.get_peft_model(llama(), one) for one in (LORA, prompt))
    layer: Any = model.get_submodule("model.layers.0.self_attn.q_proj")
    (tmp_path / "adapter_config.json").write_text('{"r": 8}')
    mistakes: list[tuple[type[Exception], Callable[[], Any]]] = [
        (KeyError, lambda: peftcore.get_peft_model_state_dict(model, adapter_name="no")),
        (KeyError, lambda: peftcore.set_peft_model_state_dict(model, {}, adapter_name="no")),
        (KeyError, lambda: layer.get_delta_weight("no")),
        (KeyError, lambda: model.add_adapter("a.b", LORA)),
        (ValueError, lambda: model.set_adapter("no")),
        (KeyError, lambda: peftcore.get_peft_config({"peft_type": "NO"})),
        (KeyError, lambda: peftcore.PeftConfig.from_pretrained(str(tmp_path))),
        (AttributeError, lambda: peftcore.get_peft_model_state_dict(llama())),
        (AttributeError, lambda: peftcore.set_peft_model_state_dict(llama(), {})),
        (NotImplementedError, lambda: peftcore.LoraConfig(bias="no")),
        (TypeError, lambda: model.add_weighted_adapter(["default"], [1.0], "b", combination_type="ties")),
        (RuntimeError, lambda: model.add_weighted_adapter(["default"], [1.0], "b", "ties", majority_sign_method="no")),
        (IndexError, lambda: model.add_adapter("b", peftcore.LoraConfig(trainable_token_indices=[9999]))),
        (IndexError, lambda: peftcore.get_peft_model(llama(), peftcore.LoraConfig(layer_replication=[(0, 99)]))),
        (TypeError, lambda: peftcore.get_peft_model(llama(), peftcore.PromptTuningConfig(task_type="CAUSAL_LM"))),
        (AttributeError, lambda: prompted.merge_and_unload()),
        (AttributeError, lambda: prompted.merge_adapter()),
        (AttributeError, lambda: prompted.add_weighted_adapter(["default"], [1.0], "b")),
    ]
    for kind, mistake in mistakes:
        with pytest.raises(PeftError) as refusal:
            mistake()
        assert isinstance(refusal.value, kind), refusal.value
        assert str(refusal.value) == refusal.value.args[0], "a KeyError would be shown in quotes"
