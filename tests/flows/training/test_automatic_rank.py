"""`method.r: auto`: ranks are searched once a run and are part of it."""

import json
from typing import Any

import pytest

from flows.errors import StageError
from flows.paths import Paths
from flows.stages import train
from peftcore import PeftConfig


class _Killed(BaseException):
    pass


AUTO: dict[str, Any] = {"r": "auto", "auto": {"r": 4, "steps": 3, "held_out": 1}, "lora_alpha": 8, "lora_dropout": 0.1}


def test_as_many_parameters_as_the_fixed_rank_with_its_scaling(prepared: Paths, tiny_params) -> None:
    train.run(tiny_params(train={"max_steps": 2}), prepared)
    fixed = json.loads(prepared.training_summary.read_text())["trainable_parameters"]
    train.run(tiny_params(method=AUTO, train={"max_steps": 2}), prepared)
    found = json.loads((prepared.training / "ranks.json").read_text())
    assert json.loads(prepared.training_summary.read_text())["trainable_parameters"] == found["parameters"]
    assert 0.95 * fixed < found["parameters"] <= fixed
    config: Any = PeftConfig.from_pretrained(prepared.adapter)
    assert config.rank_pattern == found["ranks"] and len(set(found["ranks"].values())) > 1
    assert all(config.alpha_pattern[path] == 2 * rank for path, rank in found["ranks"].items())


def test_an_interrupted_run_goes_on_with_the_ranks_that_it_has(
    prepared: Paths, tiny_params, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = tiny_params(method=AUTO)
    train.run(params, prepared)
    whole = (prepared.adapter / "adapter_model.safetensors").read_bytes()
    with monkeypatch.context() as patch:

        def die(self: Any, args: Any, state: Any, *_: Any, **__: Any) -> None:
            if state.global_step == 5:
                raise _Killed

        patch.setattr(train.ShowProgress, "on_step_begin", die)
        with pytest.raises(_Killed):
            train.run(params, prepared)

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("searched again")

    monkeypatch.setattr("flows.training.automatic_rank.find_ranks", never)
    train.run(params, prepared)
    assert (prepared.adapter / "adapter_model.safetensors").read_bytes() == whole


def test_a_tolerance_may_take_fewer_parameters(prepared: Paths, tiny_params) -> None:
    loose = AUTO | {"auto": AUTO["auto"] | {"tolerance": 10.0}}
    train.run(tiny_params(method=loose, train={"max_steps": 1}), prepared)
    found = json.loads((prepared.training / "ranks.json").read_text())
    assert found["ladder"] and found["parameters"] == found["ladder"][-1]["parameters"]


def test_too_few_rows_to_search_on_are_said(prepared: Paths, tiny_params) -> None:
    many = AUTO | {"auto": {"steps": 30}}
    with pytest.raises(StageError, match=r"method\.auto\.steps \+ held_out = 34 batches of 4 rows; there are 32"):
        train.run(tiny_params(method=many), prepared)
