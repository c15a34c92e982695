"""Options for reading a saved adapter, under HF PEFT's names, and the tensors of an adapter without its model."""

import dataclasses
import os
import re
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftcore.errors import CheckpointError, ConfigError
from peftcore.files import hub
from peftcore.files.tensors import PREFIX, read_tensors

_SHARED_PREFIX = "base_model."
_FLAGS = ("autocast_adapter_dtype", "low_cpu_mem_usage", "strict", "ignore_mismatched_sizes")


class IncompatibleKeys(NamedTuple):
    """Parameters that a directory did not fill, and keys of the directory that were not used."""

    missing_keys: list[str]
    """Names of parameters in HF PEFT's model, with the adapter's name in them."""
    unexpected_keys: list[str]


@dataclasses.dataclass(frozen=True)
class Reading:
    """Options for reading a saved adapter into a model."""

    autocast_adapter_dtype: bool = True
    """False: parameters in the dtype of their layer. True: float32 if the layer has 16 bits or fewer."""
    low_cpu_mem_usage: bool = False
    """True: parameters get no memory before the saved tensors are there."""
    torch_device: str | int | torch.device | None = None
    """Device to which the tensors are read; each then moves to its layer's device."""
    key_mapping: Mapping[str, str] | None = None
    """{regular expression: replacement} for the saved keys; see `mapped`."""
    strict: bool = True
    """False accepts missing and unexpected keys, with a warning; missing parameters keep their initial values."""
    ignore_mismatched_sizes: bool = False
    """True treats tensors of another shape as missing, with a warning."""
    any_head: bool = False
    """True: the adapter's model may have another head than this one, or none, as transformers loads base weights."""
    rename: Callable[[str], str] | None = None
    """Gives a saved key, without `base_model.model.`, another name before all other changes of keys."""

    def __post_init__(self) -> None:
        for name in _FLAGS:
            if not isinstance(value := getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False; got {value!r:.200}")
        if self.torch_device is not None:
            _device(self.torch_device)
        if self.low_cpu_mem_usage and self.accepts_missing:
            raise ConfigError(
                "low_cpu_mem_usage=True makes no initial values, and strict=False and ignore_mismatched_sizes=True "
                "need them for what the directory lacks; use one of the two"
            )

    @property
    def accepts_missing(self) -> bool:
        """True if parameters may keep their initial values."""
        return not self.strict or self.ignore_mismatched_sizes

    def prepared(self, tensors: Mapping[str, Tensor], other_mapping: Mapping[str, str] | None) -> Mapping[str, Tensor]:
        """Return a directory's tensors under the mapped keys, on the chosen device.

        Args:
            tensors: The tensors by key.
            other_mapping: The mapping to use if the caller gave none.
        """
        tensors = tensors if self.rename is None else renamed(tensors, self.rename)
        tensors = mapped(tensors, other_mapping if self.key_mapping is None else self.key_mapping)
        if self.torch_device is None:
            return tensors
        return {key: tensor.to(self.torch_device) for key, tensor in tensors.items()}


def _device(name: Any) -> torch.device:
    """Return a device that exists; ConfigError for any other name."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, TypeError, AssertionError, AttributeError, NotImplementedError) as error:
        raise ConfigError(f"torch_device={name!r:.200} is not a device of this machine ({error}); try 'cpu'") from error
    return device


def check_offload(ephemeral_gpu_offload: bool) -> None:
    """Raise ConfigError for `ephemeral_gpu_offload=True` without CUDA, and warn with CUDA that it changes nothing."""
    if ephemeral_gpu_offload is False:
        return
    if ephemeral_gpu_offload is not True:
        raise ConfigError(f"ephemeral_gpu_offload must be True or False; got {ephemeral_gpu_offload!r:.200}")
    if not torch.cuda.is_available():
        raise ConfigError(
            "ephemeral_gpu_offload=True needs a CUDA device, and PyTorch finds none; leave it out: loading computes "
            "nothing that would be slow on a CPU"
        )
    warnings.warn(
        "ephemeral_gpu_offload=True changes nothing: loading computes nothing that could be offloaded", stacklevel=3
    )


def mapped(tensors: Mapping[str, Tensor], key_mapping: Mapping[str, str] | None) -> Mapping[str, Tensor]:
    """Return tensors under new keys, as HF PEFT's `key_mapping` gives them.

    Args:
        tensors: The tensors by key.
        key_mapping: {regular expression: replacement}. The first expression that occurs in a key, without
            `base_model.model.`, is replaced everywhere in it. None or {} for no change.

    Raises:
        ConfigError: An expression is not valid.
        CheckpointError: Two keys become the same.
    """
    if not key_mapping:
        return tensors
    try:
        rules = [(re.compile(expression), text) for expression, text in key_mapping.items()]
        keys = {key: _mapped_key(key, rules) for key in tensors}
    except (re.error, TypeError, IndexError) as error:
        raise ConfigError(
            f"key_mapping must be {{regular expression: replacement}}; got {dict(key_mapping)!r:.200} ({error})"
        ) from error
    if len(set(keys.values())) < len(keys):
        new = list(keys.values())
        twice = next(key for key in new if new.count(key) > 1)
        raise CheckpointError(f"key_mapping gives several tensors the key {twice!r}; make the expressions narrower")
    return {keys[key]: tensor for key, tensor in tensors.items()}


def renamed(tensors: Mapping[str, Tensor], rename: Callable[[str], str]) -> Mapping[str, Tensor]:
    """Return tensors under new keys; `base_model.model.` stays where it is.

    Args:
        tensors: The tensors by key.
        rename: Gives a key without `base_model.model.` its new name.
    """
    prefixes = {key: PREFIX if key.startswith(PREFIX) else "" for key in tensors}
    return {f"{prefixes[key]}{rename(key.removeprefix(PREFIX))}": tensor for key, tensor in tensors.items()}


def under_this_head(tensors: Mapping[str, Tensor], expected: Collection[str], trunk: str) -> Mapping[str, Tensor]:
    """Return the tensors under the keys of this model, which has no head where the saved one has, or the reverse.

    Args:
        tensors: The tensors by key.
        expected: The adapter's keys. The tensors keep their keys if one of them is expected, or none would be.
        trunk: Path of the trunk in a model with a head, such as "model".
    """
    if not tensors.keys().isdisjoint(expected):
        return tensors
    inner = f"{PREFIX}{trunk}."
    without_head = {key.replace(inner, PREFIX, 1) if key.startswith(inner) else key: t for key, t in tensors.items()}
    with_head = {f"{inner}{key.removeprefix(PREFIX)}": tensor for key, tensor in tensors.items()}
    return next((new for new in (without_head, with_head) if not new.keys().isdisjoint(expected)), tensors)


def _mapped_key(key: str, rules: list[tuple[re.Pattern[str], str]]) -> str:
    prefix = next((prefix for prefix in (PREFIX, _SHARED_PREFIX) if key.startswith(prefix)), "")
    for expression, text in rules:
        replaced, count = expression.subn(text, key.removeprefix(prefix))
        if count:
            return f"{prefix}{replaced}"
    return key


def load_peft_weights(
    model_id: str | os.PathLike[str],
    device: str | int | torch.device | None = None,
    key_mapping: Mapping[str, str] | None = None,
    **hf_hub_download_kwargs: Any,
) -> dict[str, Tensor]:
    """Return the tensors of a saved adapter by PEFT's keys, without its model.

    Args:
        model_id: A directory, or a hub id such as "owner/name".
        device: Device of the tensors; None for the accelerator, or the CPU if there is none.
        key_mapping: {regular expression: replacement} for the keys without `base_model.model.`.
        hf_hub_download_kwargs: Options of a download, such as `revision`, `subfolder` and `token`.

    Raises:
        CheckpointError: The weights are absent, damaged or a pickle, or cannot be downloaded.
        ConfigError: The device or the mapping is not valid.
        TypeError: For an unknown option.
    """
    options = hub.checked_options("load_peft_weights", hf_hub_download_kwargs)
    target_device = torch.accelerator.current_accelerator(check_available=True) if device is None else _device(device)
    directory = hub.adapter_directory(model_id, needs_config=False, **options)
    with hub.naming_download(model_id):
        tensors = read_tensors(directory)
    return {key: tensor.to(target_device or "cpu") for key, tensor in mapped(tensors, key_mapping).items()}
