"""HF PEFT's functions around starts that need data, and around the inputs of encoder-decoder models."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftcore.errors import ConfigError
from peftcore.files.tensors import PREFIX
from peftcore.hf_peft.options import EvaConfig
from peftcore.injection.adapter_set import ATTRIBUTE, adapter_set
from peftcore.injection.observation import observe
from peftcore.injection.preparation import Creation, prepare_injection
from peftcore.injection.start_from_data import apply_start, initialize_from_data
from peftcore.methods.lora import Lora, LoraConfig, is_lora
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
        prepare_model_inputs_fn: None or `prepare_model_inputs_fn_language_modeling`, which is the same;
            `EvaConfig(use_label_mask=...)` chooses the tokens that count.
        prepare_layer_inputs_fn: None or `prepare_layer_inputs_fn_language_modeling`, which is the same.
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
        prepare_model_inputs_fn: None or `prepare_model_inputs_fn_language_modeling`, which is the same;
            `EvaConfig(use_label_mask=...)` chooses the tokens that count.
        prepare_layer_inputs_fn: None or `prepare_layer_inputs_fn_language_modeling`, which is the same.
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
    if not is_lora(config):
        raise ConfigError(f"get_eva_state_dict: EVA starts a LoRA; got {type(config).__name__}")
    config = replace(config, init_lora_weights="eva", eva_config=config.eva_config or {})
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
    if not is_lora(config) or str(config.init_lora_weights).lower() != "eva":
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


def forward_fn_dict(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """Return the outputs of a model for a batch of its keyword arguments."""
    return model(**inputs)


def prepare_model_inputs_fn_language_modeling(model_input: Mapping[str, Tensor], peft_config: LoraConfig) -> Tensor:
    """Return the positions (n, 2), row and token, of the tokens that count for EVA.

    Args:
        model_input: a batch of a language model, with `input_ids` (b, t), and `attention_mask` and `labels` if it has
            them.
        peft_config: the LoRA, whose `eva_config` says whether labels count.

    Raises:
        TypeError: the batch is no dictionary.
    """
    if not isinstance(model_input, Mapping):
        raise TypeError(f"a batch must be a dictionary of the model's arguments; got {type(model_input).__name__}")
    counts = model_input.get("attention_mask", torch.ones_like(model_input["input_ids"])).bool()
    options = EvaConfig(**(peft_config.eva_config or {}))
    if options["use_label_mask"] and "labels" in model_input:
        counts = counts & (model_input["labels"] != options["label_mask_value"])
    return counts.nonzero()


def prepare_layer_inputs_fn_language_modeling(layer_input: Any, model_input: Tensor, layer_name: str) -> Tensor:
    """Return the inputs (n, i) of a layer for the tokens that count for EVA.

    Args:
        layer_input: the input (b, t, i), or a tuple that begins with it.
        model_input: positions (n, 2), from `prepare_model_inputs_fn_language_modeling`.
        layer_name: the layer's path, for the error.

    Raises:
        TypeError: the input is neither.
    """
    first = layer_input[0] if isinstance(layer_input, tuple | list) else layer_input
    if not isinstance(first, Tensor):
        raise TypeError(f"the input of {layer_name} must be a tensor; got {type(first).__name__}")
    return first[model_input.T.unbind()]


def _only(function: str, model_inputs: Any, layer_inputs: Any, gather: Any) -> None:
    """Raise ConfigError for a value of an option that has one meaning here."""
    meanings: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "prepare_model_inputs_fn": (model_inputs, (None, prepare_model_inputs_fn_language_modeling)),
        "prepare_layer_inputs_fn": (layer_inputs, (None, prepare_layer_inputs_fn_language_modeling)),
        "gather_distributed_inputs": (gather, (True,)),
    }
    for name, (value, allowed) in meanings.items():
        if not any(value is one for one in allowed):
            raise ConfigError(f"{function}: {name} must be {allowed[0]!r}; got {value!r:.200}")


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
