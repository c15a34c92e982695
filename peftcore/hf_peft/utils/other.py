"""`peft.utils.other`."""

import functools
import os
import re
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from huggingface_hub import file_exists
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from torch import Tensor, nn

from peftcore.errors import ConfigError
from peftcore.hf_peft.default_targets import is_table, table
from peftcore.hf_peft.reexports import reexported
from peftcore.hf_peft.utils import (
    CONFIG_NAME,
    INCLUDE_LINEAR_LAYERS_SHORTHAND,
    SAFETENSORS_WEIGHTS_NAME,
    WEIGHTS_NAME,
    AuxiliaryTrainingWrapper,
    ModulesToSaveWrapper,
    TrainableTokensWrapper,
    _get_submodules,
    cast_mixed_precision_params,
    get_quantization_config,
    infer_device,
    prepare_model_for_kbit_training,
    shift_tokens_right,
    transpose,
)
from peftcore.injection import activation

__all__ = [
    "CONFIG_NAME",
    "INCLUDE_LINEAR_LAYERS_SHORTHAND",
    "SAFETENSORS_WEIGHTS_NAME",
    "WEIGHTS_NAME",
    "AuxiliaryTrainingWrapper",
    "ModulesToSaveWrapper",
    "TrainableTokensWrapper",
    "_freeze_adapter",
    "_get_batch_size",
    "_get_input_embeddings_name",
    "_get_no_split_modules",
    "_get_submodules",
    "_is_valid_match",
    "cast_mixed_precision_params",
    "check_file_exists_on_hf_hub",
    "fsdp_auto_wrap_policy",
    "get_pattern_key",
    "get_quantization_config",
    "id_tensor_storage",
    "infer_device",
    "match_target_against_key",
    "prepare_model_for_kbit_training",
    "shift_tokens_right",
    "str_to_bool",
    "transpose",
]


def fsdp_auto_wrap_policy(model: nn.Module) -> Callable[..., Any]:
    """Return the policy by which FSDP version 1 wraps a model: each transformer block; use it with `use_orig_params`.

    HF PEFT also wraps each layer of an adapter. Here an adapter's parameters are read by the layer that it adapts, so
    they must be in the same unit as that layer.

    Args:
        model: a model with adapters. The environment variable FSDP_TRANSFORMER_CLS_TO_WRAP names the classes of its
            blocks, separated by commas; without it, a transformers model names them.

    Raises:
        ConfigError: the model has no module of a named class.
    """
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy  # here, because it imports much

    of_model = ",".join(getattr(model, "_no_split_modules", None) or ())
    named = [name for name in os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", of_model).split(",") if name]
    present = {type(module).__name__: type(module) for module in model.modules()}
    if missing := [name for name in named if name not in present]:
        raise ConfigError(
            f"fsdp_auto_wrap_policy: {type(model).__name__} has no module of the class {missing[0]}; set "
            "FSDP_TRANSFORMER_CLS_TO_WRAP to the class of its blocks"
        )
    return functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={present[name] for name in named})


def get_pattern_key(pattern_keys: Iterable[str], key_to_match: str) -> str:
    """Return the first key of `rank_pattern` or `alpha_pattern` that matches the end of a path; else the path itself.

    Args:
        pattern_keys: regular expressions.
        key_to_match: the path of a module, such as "model.layers.0.self_attn.q_proj".
    """
    return next((key for key in pattern_keys if re.match(rf"(.*\.)?({key})$", key_to_match)), key_to_match)


def match_target_against_key(target_pattern: str, key: str) -> re.Match[str] | None:
    """Return the match of a regular expression with a whole path; None if it does not match."""
    return re.fullmatch(target_pattern, key)


def _is_valid_match(key: str, target_key: str) -> bool:
    """Return True if a path is `target_key`, or ends in it after a dot."""
    return key == target_key or key.endswith(f".{target_key}")


def _freeze_adapter(model: nn.Module, adapter_name: str) -> None:
    """Freeze all parameters of an adapter.

    Raises:
        AdapterNameError: the adapter is not loaded.
    """
    activation.set_requires_grad(model, adapter_name, False)


def _get_batch_size(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> int:
    """Return the number of rows of the inputs of a language model.

    Raises:
        ConfigError: both are None; also a ValueError.
    """
    if input_ids is None and inputs_embeds is None:
        raise ConfigError("_get_batch_size: give input_ids or inputs_embeds")
    return len(inputs_embeds if input_ids is None else input_ids)  # type: ignore[arg-type]


def _get_input_embeddings_name(model: Any, default: str | None = None) -> str | None:
    """Return the path of a transformers model's input embeddings; `default` for other models."""
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    paths = (path for path, module in model.named_modules() if module is embeddings)
    return next(paths, default)


def _get_no_split_modules(model: Any) -> set[str]:
    """Return the names of the classes of modules that stay on one device."""
    return set(getattr(model, "_no_split_modules", None) or ())


def id_tensor_storage(tensor: Tensor) -> tuple[torch.device, int, int]:
    """Return (device, address, bytes) of a tensor's memory, which are equal for tensors that share their memory."""
    storage = tensor.untyped_storage()
    return tensor.device, storage.data_ptr(), storage.nbytes()


def str_to_bool(value: str) -> int:
    """Return 1 for a word such as "yes", "true" or "1", and 0 for one such as "no", "false" or "0".

    Raises:
        ConfigError: another word; also a ValueError.
    """
    for number, words in ((1, ("y", "yes", "t", "true", "on", "1")), (0, ("n", "no", "f", "false", "off", "0"))):
        if value.lower() in words:
            return number
    raise ConfigError(f"str_to_bool: {value!r} is no word for true or false; use 'true' or 'false'")


def check_file_exists_on_hf_hub(repo_id: str, filename: str, **kwargs: Any) -> bool | None:
    """Return True if a repository on the hub has a file; None if the hub cannot be asked.

    Args:
        repo_id: the repository's id, such as "owner/name".
        filename: the path of the file in the repository.
        kwargs: further arguments of `huggingface_hub.file_exists`, such as `revision`.
    """
    if str_to_bool(os.environ.get("HF_HUB_OFFLINE", "0")):
        return None
    try:
        return file_exists(repo_id, filename, **kwargs)
    except (HFValidationError, EntryNotFoundError):
        return None
    except (OSError, HfHubHTTPError) as error:
        warnings.warn(f"the hub was not asked whether {repo_id} has {filename}: {error}", stacklevel=2)
        return None


def __getattr__(name: str) -> Any:
    return table(name, __name__) if is_table(name) else reexported(__name__, name)
