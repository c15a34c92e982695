"""LoftQ initialisation for a base that the pipeline quantises. arXiv:2310.08659.

The base stays W's quantisation Q, so evaluation and merging need only the adapter: s·BA starts as the best
approximation of W − Q at its rank. Further alternations would change Q, which an adapter's files do not contain.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from flows.errors import StageError
from flows.params import Params
from peftcore import AdaLoraConfig, LoraConfig, PeftConfig, get_peft_model, replace_lora_weights_loftq


def attach_adapter(params: Params, model: Any, config: PeftConfig, original: Path) -> Any:
    """Return the model with a new adapter.

    Args:
        params: The parameters of the run.
        model: The base in its quantised storage.
        config: The configuration of the adapter.
        original: Folder of the weights before quantisation.

    Raises:
        StageError: `loftq_config` does not fit the base's storage.
    """
    # for isinstance, an AdaLoraConfig is a LoraConfig, as in HF PEFT
    if not isinstance(config, LoraConfig) or isinstance(config, AdaLoraConfig) or config.init_lora_weights != "loftq":
        return get_peft_model(model, config)
    storage = params.quantization.storage
    if storage == "none":
        return get_peft_model(model, config)
    if storage == "gguf":
        is_option = "init_lora_weights" in params.method.options
        key = "method.options.init_lora_weights" if is_option else "method.init"
        raise StageError(
            f"{key} is loftq, which needs the weights before quantisation, and quantization.storage gguf has none; "
            f"give another {key}, or storage nf4"
        )
    expected = {"loftq_bits": 8 if storage.endswith("int8") else 4, "loftq_iter": 1}
    if wrong := {name: value for name, value in (config.loftq_config or {}).items() if value != expected[name]}:
        raise StageError(
            f"method.options.loftq_config is {wrong}, but the base's storage is {storage}, which needs {expected}; "
            "leave loftq_config out, or set quantization.storage to none, where LoftQ quantises the weights itself"
        )
    model = get_peft_model(model, replace(config, init_lora_weights=True, loftq_config={}))
    replace_lora_weights_loftq(model, original)
    return model
