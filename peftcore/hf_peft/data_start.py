"""HF PEFT's functions around starts that need data, and around the inputs of encoder-decoder models."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, cast

from torch import Tensor, nn

from peftcore.errors import ConfigError
from peftcore.files.tensors import PREFIX
from peftcore.injection.adapter_set import ATTRIBUTE, adapter_set
from peftcore.injection.observation import observe
from peftcore.injection.preparation import Creation, prepare_injection
from peftcore.injection.start_from_data import apply_start, initialize_from_data
from peftcore.methods.lora import Lora, LoraConfig
from peftcore.methods.lora.variants.eva import Eva, EvaStateDict

_WITHOUT_VALUES = Creation(low_cpu_mem_usage=True)


def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Any]] | None = None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    forward_fn: Callable[[Any, Mapping[str, Any]], Any] | None = None,
    prepare_model_inputs_fn: Callable[..., Any] | None = None,
    prepare_layer_inputs_fn: Any = None,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Initialise a LoRA with init_lora_weights="eva" from batches; see `peftcore.initialize_from_data`.

    Args:
        model: the model with the adapter.
        dataloader: batches of the model's keyword arguments.
        eva_state_dict: the result of `get_eva_state_dict`, in place of batches. Layers that are not in it get
            the usual start, with a warning; layers with rank 0 lose the adapter.
        forward_fn: function to call as `forward_fn(model, batch)` in place of `model(**batch)`.
        prepare_model_inputs_fn: only None; `EvaConfig(use_label_mask=...)` chooses the tokens that count.
        prepare_layer_inputs_fn: only None.
        adapter_name: the adapter.
        gather_distributed_inputs: only True.
        show_progress_bar: show a progress bar.

    Raises:
        ConfigError: the adapter needs no data, there is no batch, or an option has another value than the ones above.
    """
    _only("initialize_lora_eva_weights", prepare_model_inputs_fn, prepare_layer_inputs_fn, gather_distributed_inputs)
    if eva_state_dict is not None:
        _start_from(model, eva_state_dict, adapter_name)
    elif dataloader is None:
        raise ConfigError(
            "initialize_lora_eva_weights: give batches of the model's keyword arguments as dataloader, or give "
            "eva_state_dict"
        )
    else:
        initialize_from_data(model, dataloader, adapter_name, forward_fn, show_progress_bar)


def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Any]],
    peft_config: LoraConfig | None = None,
    forward_fn: Callable[[Any, Mapping[str, Any]], Any] | None = None,
    prepare_model_inputs_fn: Callable[..., Any] | None = None,
    prepare_layer_inputs_fn: Any = None,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """Return EVA's start A of each layer, without changing the model; see `peftcore.initialize_from_data`.

    Args:
        model: the model, with or without adapters.
        dataloader: batches of the model's keyword arguments.
        peft_config: the LoRA to start; None for the one that the model has.
        forward_fn: function to call as `forward_fn(model, batch)` in place of `model(**batch)`.
        prepare_model_inputs_fn: only None; `EvaConfig(use_label_mask=...)` chooses the tokens that count.
        prepare_layer_inputs_fn: only None.
        adapter_name: the adapter whose configuration is taken.
        gather_distributed_inputs: only True.
        show_progress_bar: show a progress bar.

    Returns:
        {name of the layer in HF PEFT's model: A (rank, in_features)}; a layer that gets no rank has 0 rows.

    Raises:
        ConfigError: there is no configuration of a LoRA, no batch, or an option has another value than the ones above.
    """
    _only("get_eva_state_dict", prepare_model_inputs_fn, prepare_layer_inputs_fn, gather_distributed_inputs)
    is_adapted = ATTRIBUTE in vars(model)
    if peft_config is None and not is_adapted:
        raise ConfigError("get_eva_state_dict: the model has no adapter; give peft_config, such as LoraConfig()")
    if peft_config is None:
        adapter_set(model).require(adapter_name)
    config: Any = peft_config or adapter_set(model).configs[adapter_name]
    if not isinstance(config, LoraConfig):
        raise ConfigError(f"get_eva_state_dict: EVA starts a LoRA; got {type(config).__name__}")
    config = replace(config, init_lora_weights="eva")
    adapters = prepare_injection(model, config, "eva_start", _WITHOUT_VALUES).adapters
    layers = {path: lora for path, lora in adapters.items() if isinstance(lora, Lora) and lora.base.kind == "linear"}
    observer = Eva(config, layers)
    bases = {path: lora.base.layer for path, lora in layers.items()}
    observe(model, observer, bases, dataloader, forward_fn, show_progress_bar)
    prefix = PREFIX if is_adapted else ""
    return {f"{prefix}{path}": observer.start(path, rank) for path, rank in observer.ranks().items()}


def _start_from(model: nn.Module, eva_state_dict: Mapping[str, Tensor], adapter_name: str) -> None:
    adapters = adapter_set(model)
    adapters.require(adapter_name)
    config = adapters.configs[adapter_name]
    if not isinstance(config, LoraConfig) or str(config.init_lora_weights).lower() != "eva":
        raise ConfigError(f"initialize_lora_eva_weights: {adapter_name!r} is no LoRA with init_lora_weights='eva'")
    layers = cast(dict[str, Lora], adapters.of_method(adapter_name))
    starts = {name.removeprefix(PREFIX): start for name, start in eva_state_dict.items()}
    if unknown := sorted(starts.keys() - layers.keys()):
        raise ConfigError(
            f"eva_state_dict: {adapter_name!r} does not adapt {unknown[0]}; it adapts {', '.join(layers)}"
        )
    for path, start in starts.items():
        if start.dim() != 2 or start.shape[1] != layers[path].base.in_features:
            raise ConfigError(
                f"eva_state_dict: A of {path} must have the shape (rank, {layers[path].base.in_features}); got "
                f"{tuple(start.shape)}"
            )
    if missing := sorted(layers.keys() - starts.keys()):
        warnings.warn(f"eva_state_dict has no {', '.join(missing)}; these layers get the usual start", stacklevel=3)
    apply_start(model, adapter_name, config, EvaStateDict(config, layers, starts))


def _only(function: str, model_inputs: Any, layer_inputs: Any, gather: Any) -> None:
    """Raise ConfigError for a value of an option that has only one value here."""
    fixed = {
        "prepare_model_inputs_fn": (model_inputs, None),
        "prepare_layer_inputs_fn": (layer_inputs, None),
        "gather_distributed_inputs": (gather, True),
    }
    for name, (value, only) in fixed.items():
        if value is not only:
            raise ConfigError(f"{function}: {name} must be {only!r}; got {value!r:.200}")


def shift_tokens_right(input_ids: Tensor, pad_token_id: int, decoder_start_token_id: int) -> Tensor:
    """Return the decoder's inputs for labels: shifted by one position, with padding in place of -100.

    Args:
        input_ids: labels (rows, tokens).
        pad_token_id: id of the padding token.
        decoder_start_token_id: id of the first token of each row.

    Raises:
        ValueError: `pad_token_id` is None.
    """
    if pad_token_id is None:
        raise ValueError("shift_tokens_right: pad_token_id is None; set pad_token_id in the model's configuration")
    shifted = input_ids.roll(1, dims=1)
    shifted[:, 0] = decoder_start_token_id
    return shifted.masked_fill(shifted == -100, pad_token_id)
