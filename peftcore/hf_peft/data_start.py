"""HF PEFT's functions around starts that need data, and around the inputs of encoder-decoder models."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from peftcore.errors import ConfigError
from peftcore.injection.start_from_data import initialize_from_data


def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Any]] | None = None,
    eva_state_dict: Mapping[str, Any] | None = None,
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
        eva_state_dict: only None; save the initialised adapter instead.
        forward_fn: function to call as `forward_fn(model, batch)` in place of `model(**batch)`.
        prepare_model_inputs_fn: only None; `EvaConfig(use_label_mask=...)` chooses the tokens that count.
        prepare_layer_inputs_fn: only None.
        adapter_name: the adapter.
        gather_distributed_inputs: only True.
        show_progress_bar: show a progress bar.

    Raises:
        ConfigError: the adapter needs no data, there is no batch, or an option has another value than the ones above.
    """
    fixed = {
        "eva_state_dict": (eva_state_dict, None),
        "prepare_model_inputs_fn": (prepare_model_inputs_fn, None),
        "prepare_layer_inputs_fn": (prepare_layer_inputs_fn, None),
        "gather_distributed_inputs": (gather_distributed_inputs, True),
    }
    for name, (value, only) in fixed.items():
        if value is not only:
            raise ConfigError(f"initialize_lora_eva_weights: {name} must be {only!r}; got {value!r:.200}")
    if dataloader is None:
        raise ConfigError("initialize_lora_eva_weights: give batches of the model's keyword arguments as dataloader")
    initialize_from_data(model, dataloader, adapter_name, forward_fn, show_progress_bar)


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
