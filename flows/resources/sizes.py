"""What a run keeps in memory whatever its batches are, counted on the meta device, where a model takes no memory.

4 bits     n/2 bytes of codes; a scale for 64 weights: 4 bytes, or, quantised in their turn (double quantisation,
           arXiv:2305.14314, section 3), 1 byte and 4 more for 256 scales
8 bits     n bytes of codes, 4 bytes of scale a row. arXiv:2208.07339
optimiser  two averages of each trained weight in its type (AdamW); in 8 bits 1 byte each and 4 more for 256 of them
           (arXiv:2110.02861), but tensors below 4,096 elements are kept whole
"""

import copy
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.quantizers.base import get_keys_to_not_convert

from flows.base.model import compute_dtype, device
from flows.errors import PlanError
from flows.params import Params
from flows.training.adapter_choice import adapter_config
from peftcore import AdapterLayer, PeftConfig, PeftError, get_peft_model

SCALED_TOGETHER = 64
"""4-bit weights that share a scale (count)."""
SCALES_TOGETHER = 256
"""Scales, or 8-bit optimiser values, that share one of their own (count)."""
SMALLEST_IN_8_BITS = 4096
"""Elements from which bitsandbytes keeps a tensor's averages in 8 bits."""
CODEBOOK_4, CODEBOOK_8 = 16 * 4, 256 * 4
"""Bytes of the table of values that a 4-bit weight, and its quantised scales, come with."""


@dataclass(frozen=True)
class Sizes:
    """Bytes, and one count."""

    quantized: int
    """Base weights in 4 or 8 bits, with their scales."""
    plain: int
    """The base's others: embeddings, output head, norms, buffers; everything in a base that is not quantised."""
    adapters: int
    gradients: int
    optimizer: int
    mapped: int
    """The file of the weights that were quantised, in 16 bits, which the loader keeps mapped on a CPU."""
    dequantized: int
    """The most quantised weights that are read back into plain ones at a time."""
    unquantized: int
    """All base weights in the type that activations have: what is merged, and what loading passes through."""
    base_file: int
    """All base weights in 16 bits, as the fetch stage writes them."""
    largest: int
    """The largest weight in 16 bits."""
    trainable: int
    """Trained weights (count)."""


def with_blocks(config: Any, count: int) -> Any:
    """A configuration of the same widths with `count` blocks."""
    made = copy.deepcopy(config)
    text = made.get_text_config(decoder=True)
    total = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == total:  # one entry a block, such as layer_types
            setattr(text, name, value[:count])
    text.num_hidden_layers = count
    return made


def number_of_blocks(config: Any) -> int:
    return config.get_text_config(decoder=True).num_hidden_layers


def without_start(config: PeftConfig) -> PeftConfig:
    """The adapter's configuration with a start that needs neither weights nor data."""
    return _changed(config, init_lora_weights=True)


def planned_adapter(params: Params, total_steps: int) -> PeftConfig:
    """The adapter's configuration as far as it says what is kept: no start, and no dropout, which draws numbers."""
    return _changed(without_start(adapter_config(params, total_steps)), lora_dropout=0.0)


def _changed(config: PeftConfig, **values: Any) -> PeftConfig:
    known = {field.name for field in fields(config)}
    return replace(config, **{name: value for name, value in values.items() if name in known})


def base_on_meta(config: Any, params: Params) -> Any:
    """The base without weights, in the type of its activations."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=compute_dtype(params.quantization))


def sizes(config: Any, params: Params, total_steps: int) -> Sizes:
    """Count what training `config`'s model keeps; PlanError if the adapter does not fit it."""
    model = base_on_meta(config, params)
    width = compute_dtype(params.quantization).itemsize
    own = {id(parameter): parameter for parameter in model.parameters()}
    unquantized, base_file = _bytes(own.values()), 2 * sum(parameter.numel() for parameter in own.values())
    codes = _codes(model, params)
    plain = _bytes(parameter for key, parameter in own.items() if key not in codes) + _bytes(model.buffers())
    try:
        model = get_peft_model(model, planned_adapter(params, total_steps))
    except PeftError as error:
        raise PlanError(f"method: {error}") from error
    added = [parameter for parameter in model.parameters() if id(parameter) not in own]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Sizes(
        quantized=sum(codes.values()),
        plain=plain,
        adapters=_bytes(added),
        gradients=_bytes(trained),
        optimizer=sum(_averages(parameter, params) for parameter in trained),
        mapped=0 if device().type == "cuda" else sum(2 * own[key].numel() for key in codes),
        dequantized=_read_together(model, codes, 4 + width if params.quantization.storage == "int8" else width),
        unquantized=unquantized,
        base_file=base_file,
        largest=2 * max(parameter.numel() for parameter in own.values()),
        trainable=sum(parameter.numel() for parameter in trained),
    )


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def _codes(model: nn.Module, params: Params) -> dict[int, int]:
    """{id of a weight that the base's loader quantises: bytes it then takes}"""
    kind = params.quantization.storage
    if kind == "none":
        return {}
    storage = BitsAndBytesConfig(load_in_8bit=kind == "int8", load_in_4bit=kind != "int8")
    # the choice is transformers' own: it exchanges the layers of a copy, whose weights are not asked for
    exchanged: Any = copy.deepcopy(model)
    exchanged = replace_with_bnb_linear(exchanged, get_keys_to_not_convert(model), storage)  # type: ignore[arg-type]
    found: dict[int, int] = {}
    for path, module in exchanged.named_modules():
        weight: Any = model.get_submodule(path).weight if isinstance(module, Linear4bit | Linear8bitLt) else None
        if isinstance(module, Linear4bit):
            found[id(weight)] = _in_4_bits(weight.numel(), params.quantization.double_quant)
        elif isinstance(module, Linear8bitLt):
            found[id(weight)] = weight.numel() + 4 * weight.shape[0]
    return found


def _in_4_bits(count: int, double: bool) -> int:
    scales = -(-count // SCALED_TOGETHER)
    kept = scales + 4 * -(-scales // SCALES_TOGETHER) + 4 + CODEBOOK_8 if double else 4 * scales
    return -(-count // 2) + kept + CODEBOOK_4


def _averages(parameter: nn.Parameter, params: Params) -> int:
    """Bytes that the optimiser keeps for one trained tensor."""
    count = parameter.numel()
    if params.train.optimizer.endswith("8bit") and count >= SMALLEST_IN_8_BITS:
        return 2 * (count + 4 * -(-count // SCALES_TOGETHER))
    return 2 * count * parameter.itemsize


def _read_together(model: nn.Module, codes: dict[int, int], width: int) -> int:
    """Bytes of the largest group of layers that share an input and are computed, and so dequantised, together."""
    most = 0
    for host in model.modules():
        if isinstance(host, AdapterLayer):
            group = [getattr(each.base_layer, "weight", None) for each in (host, *host.sharing)]
            most = max(most, sum(width * weight.numel() for weight in group if id(weight) in codes))  # type: ignore
    return most
