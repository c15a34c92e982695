"""What params.yaml says of the adapter, as the configuration that `peftcore` takes."""

from typing import Any

from flows.params.method_fields import FIELDS
from flows.params.model import AdaLora, Params
from flows.training.objectives import rows_of
from peftcore import PeftConfig


def adapter_config(params: Params, total_steps: int) -> PeftConfig:
    """Return the method's configuration.

    Args:
        params: Read from params.yaml, which refuses `method`'s options that the method has not.
        total_steps: Optimiser steps of the run, over which AdaLoRA spreads its budget.
    """
    method = params.method
    options: dict[str, Any] = {
        "task_type": rows_of(params).task,
        "base_model_name_or_path": params.base.source,
        "target_modules": method.target_modules,
    }
    for option, field in FIELDS.get(method.name, {}).items():
        value = method.auto.r if option == "r" and method.r == "auto" else getattr(method, option)
        if value is not None:  # null: the configuration's own default
            options[field] = value
    if method.name == "lora":
        options["use_rslora"] = method.use_rslora
    if method.name == "adalora":
        options |= _adalora_options(method.adalora, total_steps)
    return PeftConfig.from_dict({"peft_type": method.name.upper(), **options, **method.options})


def _adalora_options(adalora: AdaLora, total_steps: int) -> dict[str, Any]:
    return {
        "init_r": adalora.init_r,
        "target_r": adalora.target_r,
        "tinit": int(adalora.warmup_share * total_steps),
        "tfinal": int(adalora.final_share * total_steps),
        "deltaT": adalora.interval,
        "orth_reg_weight": adalora.orth_reg_weight,
        "beta1": adalora.beta1,
        "beta2": adalora.beta2,
        "total_step": total_steps,
    }
