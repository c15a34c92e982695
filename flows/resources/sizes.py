"""Memory of a run that does not depend on its batches, counted on the meta device, where a model takes no memory.

4 bits     n/2 bytes of codes; per 64 weights a scale of 4 bytes or, with double quantisation (arXiv:2305.14314,
           section 3), of 1 byte plus 4 bytes per 256 scales
hqq4       n/2 bytes of codes; per 64 weights a scale and a zero point in the dtype of the activations
8 bits     n bytes of codes, and 4 bytes of scale per row (arXiv:2208.07339); torchao_int8 one more byte per row
optimiser  two moments per trained weight in its dtype (AdamW); in 8 bits 1 byte each plus 4 bytes per 256
           (arXiv:2110.02861), but tensors below 4,096 elements keep full moments
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
from transformers.quantizers.quantizers_utils import should_convert_module

from flows.base.model import compute_dtype, device
from flows.errors import EstimateError
from flows.params import Params
from flows.training.adapter_choice import adapter_config
from peftcore import AdapterLayer, PeftConfig, PeftError, get_peft_model

SCALED_TOGETHER = 64
"""4-bit weights per scale (count)."""
SCALES_TOGETHER = 256
"""Scales, or 8-bit optimiser values, per second-level scale (count)."""
SMALLEST_IN_8_BITS = 4096
"""Elements from which bitsandbytes keeps a tensor's moments in 8 bits."""
CODEBOOK_4, CODEBOOK_8 = 16 * 4, 256 * 4
"""Bytes of the code tables of a 4-bit weight and of its quantised scales."""


@dataclass(frozen=True)
class Sizes:
    """Bytes, and one count."""

    quantized: int
    """Base weights in 4 or 8 bits, with their scales."""
    plain: int
    """Other base weights: embeddings, output head, norms, buffers; all weights of a base that is not quantised."""
    adapters: int
    gradients: int
    optimizer: int
    mapped: int
    """16-bit file of the weights that were quantised, which the loader keeps mapped on a CPU."""
    dequantized: int
    """Maximum of quantised weights that are dequantised at a time."""
    base_file: int
    """All base weights in 16 bits, as the fetch stage writes them."""
    largest: int
    """The largest weight in 16 bits."""
    trainable: int
    """Trained weights (count)."""


def with_blocks(config: Any, count: int) -> Any:
    """Return a configuration with the same widths and `count` blocks."""
    shallow = copy.deepcopy(config)
    text = shallow.get_text_config(decoder=True)
    total = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == total:  # one entry per block, such as layer_types
            setattr(text, name, value[:count])
    text.num_hidden_layers = count
    return shallow


def number_of_blocks(config: Any) -> int:
    """Return the number of blocks of a configuration."""
    return config.get_text_config(decoder=True).num_hidden_layers


def without_start(config: PeftConfig) -> PeftConfig:
    """Return the adapter's configuration with an initialisation that needs neither weights nor data."""
    return _changed(config, init_lora_weights=True)


def sized_adapter(params: Params, total_steps: int) -> PeftConfig:
    """Return the adapter's configuration without initialisation and dropout, which do not change its sizes."""
    return _changed(without_start(adapter_config(params, total_steps)), lora_dropout=0.0)


def _changed(config: PeftConfig, **values: Any) -> PeftConfig:
    known = {field.name for field in fields(config)}
    return replace(config, **{name: value for name, value in values.items() if name in known})


def base_on_meta(config: Any, params: Params) -> Any:
    """Return the base without weights, in the activations' dtype."""
    dtype = compute_dtype(params.quantization)  # measures the CPU's products, which take no time on the meta device
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def sizes(config: Any, params: Params, total_steps: int) -> Sizes:
    """Count the memory of training `config`'s model. Raises EstimateError if the adapter does not fit the model."""
    model = base_on_meta(config, params)
    width = compute_dtype(params.quantization).itemsize
    own = {id(parameter): parameter for parameter in model.parameters()}
    base_file = 2 * sum(parameter.numel() for parameter in own.values())
    codes = _codes(model, params)
    plain = _bytes(parameter for key, parameter in own.items() if key not in codes) + _bytes(model.buffers())
    try:
        model = get_peft_model(model, sized_adapter(params, total_steps))
    except PeftError as error:
        raise EstimateError(f"method: {error}") from error
    added = [parameter for parameter in model.parameters() if id(parameter) not in own]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Sizes(
        quantized=sum(codes.values()),
        plain=plain,
        adapters=_bytes(added),
        gradients=_bytes(trained),
        optimizer=sum(_averages(parameter, params) for parameter in trained),
        mapped=0 if device().type == "cuda" else sum(2 * own[key].numel() for key in codes),
        dequantized=_read_together(model, codes, 4 + width if params.quantization.storage.endswith("int8") else width),
        base_file=base_file,
        largest=2 * max(parameter.numel() for parameter in own.values()),
        trainable=sum(parameter.numel() for parameter in trained),
    )


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def _codes(model: nn.Module, params: Params) -> dict[int, int]:
    """Return {id of a weight that the loader quantises: its bytes}."""
    kind = params.quantization.storage
    if kind == "none":
        return {}
    if kind in ("torchao_int8", "hqq4"):
        skipped, width = get_keys_to_not_convert(model), compute_dtype(params.quantization).itemsize
        layers = [m for path, m in model.named_modules() if should_convert_module(path, skipped)]
        weights: list[Any] = [layer.weight for layer in layers if type(layer) is nn.Linear]
        if kind == "hqq4":  # a scale and a zero point for 64 weights
            return {id(w): w.numel() // 2 + 2 * width * (w.numel() // SCALED_TOGETHER) for w in weights}
        return {id(w): w.numel() + 5 * w.shape[0] for w in weights}  # a scale in float32 and a zero point in int8
    storage = BitsAndBytesConfig(load_in_8bit=kind == "int8", load_in_4bit=kind != "int8")
    # transformers chooses: it replaces the layers of a copy, whose weights are never read
    exchanged: Any = copy.deepcopy(model)
    exchanged = replace_with_bnb_linear(exchanged, get_keys_to_not_convert(model), storage)  # type: ignore[arg-type]
    sizes_of: dict[int, int] = {}
    for path, module in exchanged.named_modules():
        weight: Any = model.get_submodule(path).weight if isinstance(module, Linear4bit | Linear8bitLt) else None
        if isinstance(module, Linear4bit):
            sizes_of[id(weight)] = _in_4_bits(weight.numel(), params.quantization.double_quant)
        elif isinstance(module, Linear8bitLt):
            sizes_of[id(weight)] = weight.numel() + 4 * weight.shape[0]
    return sizes_of


def _in_4_bits(count: int, double: bool) -> int:
    scales = -(-count // SCALED_TOGETHER)
    scale_bytes = scales + 4 * -(-scales // SCALES_TOGETHER) + 4 + CODEBOOK_8 if double else 4 * scales
    return -(-count // 2) + scale_bytes + CODEBOOK_4


def _averages(parameter: nn.Parameter, params: Params) -> int:
    """Return the optimiser's bytes for one trained tensor."""
    count = parameter.numel()
    if params.train.optimizer.endswith("8bit") and count >= SMALLEST_IN_8_BITS:
        return 2 * (count + 4 * -(-count // SCALES_TOGETHER))
    return 2 * count * parameter.itemsize


def _read_together(model: nn.Module, codes: dict[int, int], width: int) -> int:
    """Return the bytes of the largest group of layers that share an input and are dequantised together."""
    most = 0
    for layer in model.modules():
        if isinstance(layer, AdapterLayer):
            group = [getattr(each.base_layer, "weight", None) for each in (layer, *layer.siblings)]
            most = max(most, sum(width * weight.numel() for weight in group if id(weight) in codes))  # type: ignore
    return most
