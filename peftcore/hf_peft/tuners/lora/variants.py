"""`peft.tuners.lora.variants`: the positions at which aLoRA acts, as HF PEFT's functions give them.

A model finds the positions itself (`peftcore.methods.lora.variants.alora`). A script calls these functions to pass
`alora_offsets` to a model whose forward does not name its tokens `input_ids`.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.config import PeftConfig
from peftcore.errors import AdapterNameError, ConfigError
from peftcore.hf_peft.reexports import reexported
from peftcore.injection.adapter_set import adapter_set
from peftcore.methods.lora.variants.alora import last_positions

_BASE = "__base__"


def calculate_alora_offsets(
    peft_config: Mapping[str, PeftConfig],
    active_adapter: str,
    input_ids: Tensor | None,
    adapter_names: Sequence[str] | None = None,
) -> list[int | None]:
    """Return the number of last positions of each row at which the row's aLoRA acts.

    Args:
        peft_config: {adapter name: configuration}.
        active_adapter: the adapter of all rows, unless `adapter_names` is given.
        input_ids: token ids (B, T) of B rows; None gives [].
        adapter_names: one adapter for each row; "__base__" for the base model.

    Returns:
        One element for each row. None: the adapter acts nowhere, because the row has no invocation tokens, or because
        its adapter is no aLoRA.

    Raises:
        AdapterNameError: a name is not in `peft_config`.
        ConfigError: `adapter_names` does not have one name for each row.
    """
    if input_ids is None:
        return []
    names = [active_adapter] * len(input_ids) if adapter_names is None else list(adapter_names)
    if len(names) != len(input_ids):
        raise ConfigError(f"adapter_names must have one name for each of the {len(input_ids)} rows; got {len(names)}")
    if unknown := sorted({*names} - {*peft_config, _BASE}):
        raise AdapterNameError(f"calculate_alora_offsets: no adapter {unknown[0]!r}; there are {list(peft_config)}")
    offsets: list[int | None] = [None] * len(names)
    for name in {*names} - {_BASE}:
        tokens = getattr(peft_config[name], "alora_invocation_tokens", None)
        rows = [row for row, own in enumerate(names) if own == name]
        if tokens:
            for row, count in zip(rows, last_positions(input_ids[rows], tokens).tolist(), strict=True):
                offsets[row] = count or None
    return offsets


def get_alora_offsets_for_forward(
    model: nn.Module, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **kwargs: Any
) -> dict[str, Any]:
    """Return arguments of the model's forward, with `alora_offsets` if an aLoRA is used and they are not given.

    Args:
        model: a model with adapters.
        input_ids: token ids (B, T), in which the invocation tokens are searched; not part of the result.
        inputs_embeds: embeddings (B, T, features), in which nothing can be found; not part of the result.
        kwargs: further arguments; `adapter_names` gives each row its adapter.

    Warns:
        UserWarning: only embeddings are given, so aLoRA acts nowhere.
    """
    if not _uses_alora(model, kwargs) or kwargs.get("alora_offsets") is not None:
        return kwargs
    if input_ids is None and inputs_embeds is not None:
        warnings.warn(
            "aLoRA acts nowhere in this call: inputs_embeds has no token ids, in which its invocation tokens could be "
            "found; pass alora_offsets",
            stacklevel=2,
        )
    return {**kwargs, "alora_offsets": None if input_ids is None else _offsets(model, input_ids, kwargs)}


def get_alora_offsets_for_generate(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Return the named arguments of `generate`, with `alora_offsets` if an aLoRA is used and they are not given.

    Args:
        model: a model with adapters.
        args: positional arguments of `generate`; the first one may be the token ids.
        kwargs: named arguments of `generate`.

    Warns:
        UserWarning: no token ids are given, so aLoRA acts nowhere.
    """
    if not _uses_alora(model, kwargs) or kwargs.get("alora_offsets") is not None:
        return kwargs
    ids = kwargs.get("input_ids")
    if ids is None and args and isinstance(args[0], torch.Tensor):
        ids = args[0]
    if ids is None:
        warnings.warn(
            "aLoRA acts nowhere in this text: there are no input_ids, in which its invocation tokens could be found; "
            "pass alora_offsets",
            stacklevel=2,
        )
        return {**kwargs, "alora_offsets": None}
    return {**kwargs, "alora_offsets": _offsets(model, ids if ids.dim() > 1 else ids.unsqueeze(0), kwargs)}


def _uses_alora(model: nn.Module, kwargs: Mapping[str, Any]) -> bool:
    adapters = adapter_set(model)
    names = {*adapters.selection.active[:1], *(kwargs.get("adapter_names") or ())}
    return any(getattr(adapters.configs.get(name), "alora_invocation_tokens", None) for name in names)


def _offsets(model: nn.Module, ids: Tensor, kwargs: Mapping[str, Any]) -> list[int | None]:
    adapters = adapter_set(model)
    active = next(iter(adapters.selection.active), _BASE)
    return calculate_alora_offsets(adapters.configs, active, ids, kwargs.get("adapter_names"))


def __getattr__(name: str) -> Any:
    return reexported(__name__, name)
