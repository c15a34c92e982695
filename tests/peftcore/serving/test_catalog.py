"""Model names: the base model, adapters and compositions."""

from collections.abc import Callable
from typing import Any

import openai
import pytest

from peftcore import ArrowConfig, LoraConfig, LoReftConfig
from peftcore.errors import ConfigError
from peftcore.prompts.prompt_tuning import PromptTuningConfig
from peftcore.serving import make_service
from peftcore.serving.errors import (
    AdapterFailedError,
    BadRequestError,
    UnknownModelError,
)


def test_models_are_the_base_the_adapters_and_the_compositions(served: Any) -> None:
    client = served.client()
    kinds = {model.id: model.kind for model in client.models.list()}  # type: ignore[attr-defined]
    assert kinds == {
        **{"base": "base", "mix": "composition"},
        **dict.fromkeys(("chat", "dora", "ia3", "sql"), "adapter"),
    }
    assert client.models.retrieve("sql").id == "sql"
    with pytest.raises(openai.NotFoundError, match="the model 'nope' does not exist"):
        client.models.retrieve("nope")


LORA: dict[str, Any] = {"r": 2, "init_lora_weights": False, "target_modules": "all-linear"}


def test_what_cannot_be_served_is_refused_with_the_reason(serving: Callable[..., Any], world: Any) -> None:
    world.add("prompt", PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), 0)
    world.add("alora", LoraConfig(alora_invocation_tokens=[9, 9], **{**LORA, "target_modules": ["q_proj"]}), 0)
    world.add("router", LoraConfig(arrow_config=ArrowConfig(), r=2, target_modules=["q_proj"]), 0)
    world.add("reft", LoReftConfig(r=2), 0)
    (world.folder / "damaged").mkdir()
    (world.folder / "damaged" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
    served = serving()
    other = served.begin("sql", [5, 6], 30)
    for name, kind, said in (
        ("prompt", BadRequestError, "virtual tokens before the text"),
        ("alora", BadRequestError, "needs the whole text"),
        ("router", BadRequestError, "computes with the other adapters"),
        ("reft", BadRequestError, "needs the whole text"),
        ("damaged", AdapterFailedError, "could not be loaded"),
        ("missing", UnknownModelError, "no adapter 'missing'"),
    ):
        found = served.begin(name, [5, 6], 4).result()
        assert type(found) is kind and said in str(found), found
    assert other.result()[0] == world.expected("sql", [5, 6], 30)
    assert served.service.catalog.store.statistics()["in_use"] == 0


def test_a_composition_may_not_have_another_model_s_name(world: Any) -> None:
    from peftcore.routing import AdapterStore

    store = AdapterStore(world.model)
    store.register("sql", world.folder / "sql")
    for name in ("sql", "base"):
        with pytest.raises(ConfigError, match=f"the composition '{name}' has the name"):
            make_service(world.model, world.tokenizer, store, "base", {name: None})  # type: ignore[dict-item]


def test_an_adapter_may_not_have_the_base_s_name(world: Any) -> None:
    from peftcore.routing import AdapterStore

    store = AdapterStore(world.model)
    store.register("sql", world.folder / "sql")
    with pytest.raises(ConfigError, match="the base model and an adapter are named 'sql'"):
        make_service(world.model, world.tokenizer, store, "sql")
