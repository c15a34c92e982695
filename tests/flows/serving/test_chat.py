"""The models of a chat: versions by number or stage, or one adapter."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from flows.errors import BaseModelError, ChatError
from flows.gate.promote import promote
from flows.params import Quantization
from flows.serving import chat
from flows.serving.chat import adapter_models, project_models
from flows.serving.served_base import ServedBase
from peftcore import LoraConfig, get_peft_model


@pytest.fixture
def evaluated(registered: Any, monkeypatch: pytest.MonkeyPatch) -> ServedBase:
    """The base of the project's versions, in place of loading one."""
    import json

    metrics = json.loads(registered.paths.evaluation_metrics.read_text())
    base = ServedBase(metrics["base_model"], registered.params.quantization)
    monkeypatch.setattr(chat, "load_evaluated_base", lambda *_: (torch.nn.Linear(2, 2), None, base))
    return base


def test_a_stage_is_its_version(registered: Any, evaluated: ServedBase) -> None:
    promote(registered.params, registered.paths)
    with project_models(registered.paths, registered.params, registered.paths.base) as (_, _, store, names, add):
        assert list(names) == ["base", "champion", "v0.1.0"]
        assert add("base") == "base" and store.names() == []
        assert add("champion") == add("v0.1.0") == "v0.1.0" and store.names() == ["v0.1.0"]
        with pytest.raises(ChatError, match=r"no model v9; there is: base, champion, v0\.1\.0"):
            add("v9")


def test_a_version_of_another_base_is_refused(registered: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    other = ServedBase("0" * 64, Quantization(storage="none"))
    monkeypatch.setattr(chat, "load_evaluated_base", lambda *_: (torch.nn.Linear(2, 2), None, other))
    with project_models(registered.paths, registered.params, registered.paths.base) as (_, _, store, _, add):
        with pytest.raises(BaseModelError, match="was evaluated on"):
            add("v0.1.0")
        assert store.names() == []


def test_an_adapter_has_its_folders_name(tiny_base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(tiny_base.with_name("poet"))
    with adapter_models(tiny_base.with_name("poet"), tiny_base) as (model, tokenizer, store, names, add):
        assert isinstance(model.config, LlamaConfig) and tokenizer.chat_template
        assert list(names) == ["base", "poet"] and add("poet") == "poet" == store.names()[0]
        with pytest.raises(ChatError, match="no model champion; there is: base, poet"):
            add("champion")
