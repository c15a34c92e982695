"""The section `method` of params.yaml becomes the method's own configuration."""

from typing import Any

import pytest
from method_cases import GIVEN, METHODS, NEEDED, method

from flows.params import Params
from flows.params.method_fields import FIELDS, SHARED
from flows.training.adapter_choice import adapter_config
from peftcore import ConfigError
from peftcore.registry import method_named


@pytest.mark.parametrize("name", METHODS)
def test_an_option_reaches_the_methods_own_field(name: str) -> None:
    taken = FIELDS.get(name, {})
    config = adapter_config(method(name, **{option: GIVEN[option] for option in taken}), 100)
    for option, field in taken.items():
        assert getattr(config, field) == GIVEN[option]


@pytest.mark.parametrize("name", METHODS)
def test_null_is_the_methods_own_default(name: str) -> None:
    config = adapter_config(method(name, **dict.fromkeys(SHARED)), 100)
    default = method_named(name.upper()).config(**NEEDED.get(name, {}))
    for field in {"r", "alpha", "lora_alpha", *FIELDS.get(name, {}).values()}:
        assert getattr(config, field, None) == getattr(default, field, None)


def test_lora_has_the_pipelines_defaults() -> None:
    lora: Any = adapter_config(Params(), 100)
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (16, 32, 0.0)


def test_a_schedule_is_shares_of_the_run_or_an_option() -> None:
    schedule = {"warmup_share": 0.25, "final_share": 0.5}
    config: Any = adapter_config(method("adalora", schedule=schedule, options={"tfinal": 7, "init_r": 24}), 100)
    assert (config.total_step, config.tinit, config.tfinal, config.init_r) == (100, 25, 7, 24)


def test_a_searched_rank_starts_from_the_mean_rank_of_the_search() -> None:
    config: Any = adapter_config(method("lora", r="auto", auto={"r": 12}), 100)
    assert config.r == 12


def test_rank_stabilised_scaling_and_other_options_are_passed_on() -> None:
    config: Any = adapter_config(method("lora", use_rslora=True, options={"use_dora": True, "bias": "all"}), 100)
    assert (config.use_rslora, config.use_dora, config.bias) == (True, True, "all")


def test_the_start_is_an_option_of_lora() -> None:
    config: Any = adapter_config(method("lora", init="cloq"), 100)
    assert config.init_lora_weights == "cloq"
    default: Any = adapter_config(method("lora", init="default", options={"init_lora_weights": "pissa"}), 100)
    assert default.init_lora_weights == "pissa"


def test_an_option_that_the_method_does_not_know_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="no_such"):
        adapter_config(method("lora", options={"no_such": 1}), 100)


@pytest.mark.parametrize(
    ("kind", "objective", "task"),
    [
        ("chat", "sft", "CAUSAL_LM"),
        ("preference", "dpo", "CAUSAL_LM"),
        ("preference", "orpo", "CAUSAL_LM"),
        ("classification", "classification", "SEQ_CLS"),
    ],
)
def test_the_task_type_is_that_of_the_model_that_the_objective_trains(kind: str, objective: str, task: str) -> None:
    data, base = {"source": "rows.jsonl", "kind": kind}, {"source": "hub:org/model"}
    config = adapter_config(Params.model_validate({"data": data, "base": base, "train": {"objective": objective}}), 100)
    assert (config.task_type, config.base_model_name_or_path) == (task, "hub:org/model")
