"""Conversion of a model's adapter to plain LoRA: as a second adapter of that model, or as a directory."""

from pathlib import Path
from typing import NamedTuple

from safetensors.torch import save_file
from torch import Tensor, nn

from peftcore._util.tensors import PREFIX, WEIGHTS_NAME
from peftcore.config import CONFIG_NAME
from peftcore.conversion.layer_factors import factors_by_layer
from peftcore.conversion.lora import lora_config, lora_tensors
from peftcore.files import directory_written_atomically, write_manifest
from peftcore.injection.adapter_set import adapter_set
from peftcore.injection.inject import commit_injection
from peftcore.injection.preparation import Creation, prepare_injection
from peftcore.kernels.factors import LowRankReport
from peftcore.methods.lora import LoraConfig
from peftcore.storage.adapter_state import AdapterState, adapter_state_of
from peftcore.storage.embedding_rows import embeddings_to_save


class _PlainLora(NamedTuple):
    """A LoRA that is not in a model yet."""

    config: LoraConfig
    tensors: dict[str, Tensor]
    report: LowRankReport


def convert_to_lora(
    model: nn.Module,
    adapter_name: str,
    new_name: str,
    rank: int | None = None,
    tolerance: float | None = None,
    is_trainable: bool = False,
) -> LowRankReport:
    """Add a plain LoRA to a model that computes the same as another of its adapters, exactly or approximately.

    Without `rank` and `tolerance` the conversion is exact, which only low-rank methods allow (LoRA, rsLoRA, AdaLoRA,
    VeRA). Saved modules and trained biases are copied. Call `set_adapter(new_name)` to make the new adapter active.

    Args:
        model: a model with adapters.
        adapter_name: the adapter to convert; it stays unchanged.
        new_name: the new adapter's name.
        rank: largest rank of a layer (count).
        tolerance: largest relative error of a layer's change, in Frobenius norm; each layer gets the smallest rank
            that meets it.
        is_trainable: True to leave the new adapter trainable, False to freeze it.

    Returns:
        Rank and error of each layer.

    Raises:
        ConfigError, MergeError: no LoRA can replace the adapter; the model is unchanged.
    """
    plain = _plain_lora(model, adapter_name, rank, tolerance)
    injection = prepare_injection(model, plain.config, new_name, Creation(initialise=False))
    state = AdapterState(injection.adapters, injection.biases, injection.copies, None)
    state.read(state.with_our_keys(plain.tensors, state.tensors(), new_name))
    commit_injection(model, injection, is_trainable)
    return plain.report


def save_as_lora(
    model: nn.Module,
    directory: str | Path,
    adapter_name: str = "default",
    rank: int | None = None,
    tolerance: float | None = None,
) -> LowRankReport:
    """Write a model's adapter as a directory of plain LoRA; the adapter itself stays unchanged.

    Args:
        model: a model with adapters.
        directory: where to write; an existing directory is replaced, and stays if an error occurs.
        adapter_name: the adapter to convert; its trained biases are written too.
        rank: as in `convert_to_lora`.
        tolerance: as in `convert_to_lora`.

    Returns:
        Rank and error of each layer.

    Raises:
        ConfigError, MergeError: no LoRA can replace the adapter.
    """
    plain = _plain_lora(model, adapter_name, rank, tolerance)
    rows = embeddings_to_save(model, adapter_state_of(adapter_set(model), adapter_name), adapter_name, "auto")
    base = plain.config.base_model_name_or_path or getattr(model, "name_or_path", None) or None
    plain.config.base_model_name_or_path = base
    write_lora(plain.config, rows | plain.tensors, Path(directory))
    return plain.report


def write_lora(config: LoraConfig, tensors: dict[str, Tensor], directory: Path) -> None:
    """Write an adapter directory in PEFT's format with a manifest; an existing directory is replaced."""
    with directory_written_atomically(directory) as fresh:
        # safetensors refuses views and tensors that share memory, so each tensor is cloned
        plain = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in tensors.items()}
        save_file(plain, fresh / WEIGHTS_NAME, metadata={"format": "pt"})
        (fresh / CONFIG_NAME).write_text(config.to_json())
        write_manifest(fresh)


def _plain_lora(model: nn.Module, name: str, rank: int | None, tolerance: float | None) -> _PlainLora:
    adapters = adapter_set(model)
    layers, report = factors_by_layer(model, name, rank, tolerance)
    bases = {path: adapter.base for path, adapter in adapters.adapters(name).items()}
    tensors = lora_tensors(layers, {path: (base.kind, base.kernel) for path, base in bases.items()})
    for path, module in adapters.copies(name).items():
        tensors |= {f"{PREFIX}{path}.{key}": tensor for key, tensor in module.state_dict().items()}
    for path, own in adapters.biases(name).items():
        inside = "base_layer." if path in layers and layers[path].rank else ""
        tensors[PREFIX + (path if own.base.kind == "parameter" else f"{path}.{inside}bias")] = own.bias.detach()
    return _PlainLora(lora_config(adapters.configs[name], layers), tensors, report)
