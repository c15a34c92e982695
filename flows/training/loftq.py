"""LoftQ where the pipeline quantises the base: adapters that start at what quantising lost. arXiv:2310.08659.

The base stays W's quantisation Q, so evaluating and merging need nothing but the adapter: s·BA begins as the best
approximation of W − Q of its rank. More alternations would change Q, which an adapter's files do not hold.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from flows.errors import StageError
from flows.params import Params
from peftcore import LoraConfig, PeftConfig, get_peft_model, replace_lora_weights_loftq


def attach_adapter(params: Params, model: Any, config: PeftConfig, original: Path) -> Any:
    """The model with a new adapter; original: folder of the weights that the model's were quantised from.

    Raises StageError for a loftq_config that does not fit the base's storage.
    """
    if not isinstance(config, LoraConfig) or config.init_lora_weights != "loftq":
        return get_peft_model(model, config)
    storage = params.quantization.storage
    if storage == "none":
        return get_peft_model(model, config)
    fits = {"loftq_bits": 8 if storage == "int8" else 4, "loftq_iter": 1}
    if wrong := {name: value for name, value in (config.loftq_config or {}).items() if value != fits[name]}:
        raise StageError(
            f"method.options.loftq_config is {wrong}, but the base's storage is {storage}, which fits {fits} alone; "
            "leave loftq_config out, or set quantization.storage to none, where LoftQ quantises the weights itself"
        )
    model = get_peft_model(model, replace(config, init_lora_weights=True, loftq_config={}))
    replace_lora_weights_loftq(model, original)
    return model
