"""Configuration of the adapter that params.yaml asks for."""

from dataclasses import replace
from typing import Any

from flows.params import Params
from flows.params.method_fields import FIELDS
from flows.training.objectives import rows_of
from peftcore import PeftConfig


def adapter_config(params: Params, total_steps: int) -> PeftConfig:
    """Return the method's configuration.

    Args:
        params: The parameters of the run.
        total_steps: Optimiser steps of the run, for methods with a schedule.

    Raises:
        ConfigError: `method.options` do not fit the method.
    """
    method = params.method
    options: dict[str, Any] = {
        "peft_type": method.name.upper(),
        "task_type": rows_of(params).task,
        "base_model_name_or_path": params.base.source,
        "target_modules": method.target_modules,
    }
    for option, field in FIELDS.get(method.name, {}).items():
        value = method.auto.r if option == "r" and method.r == "auto" else getattr(method, option)
        if value is not None:  # null: the configuration's own default
            options[field] = value
    if method.use_rslora:
        options["use_rslora"] = True
    if method.init != "default":
        options["init_lora_weights"] = method.init
    config = PeftConfig.from_dict({**options, **method.options})
    schedule = config.schedule_options(total_steps, method.schedule.warmup_share, method.schedule.final_share)
    return replace(config, **{name: value for name, value in schedule.items() if name not in method.options})
