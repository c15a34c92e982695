"""Conversion of a model's adapter to plain LoRA: as tensors, as a second adapter of that model, or as a directory."""

import copy
import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import save_file
from torch import Tensor, nn

from peftcore.config import CONFIG_NAME
from peftcore.conversion.layer_factors import Limits, factors_by_layer
from peftcore.conversion.lora import lora_config, lora_tensors, without_scaling
from peftcore.errors import ConfigError
from peftcore.files import directory_written_atomically, write_manifest
from peftcore.files.tensors import PREFIX, WEIGHTS_NAME
from peftcore.injection.adapter_set import adapter_set
from peftcore.injection.inject import commit_injection
from peftcore.injection.preparation import Creation, prepare_injection
from peftcore.kernels.factors import Factors, LowRankReport
from peftcore.methods.lora import Lora, LoraConfig, is_lora
from peftcore.storage.adapter_state import AdapterState, adapter_state_of
from peftcore.storage.embedding_rows import embeddings_to_save
from peftcore.storage.state_dict import has_prefix


class _PlainLora(NamedTuple):
    """A LoRA that is not in a model yet."""

    config: LoraConfig
    tensors: dict[str, Tensor]
    report: LowRankReport


def convert_to_lora(
    model: nn.Module,
    rank: int | float | None = None,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
    *,
    tolerance: float | None = None,
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Return a plain LoRA that computes the same as an adapter, exactly or approximately. The model stays as it is.

    Without `rank` and `tolerance` the conversion is exact, which only low-rank methods allow (LoRA, rsLoRA, AdaLoRA,
    VeRA). Saved modules and trained biases are copied.

    Args:
        model: a model with adapters.
        rank: an integer: rank of the LoRA (count); a layer whose change has a smaller rank gets that. A float in
            (0, 1]: each layer gets the smallest rank whose singular values have at least this share of the sum of all
            squared singular values. With a rank, every scaling of the LoRA is 1.
        adapter_name: the adapter to convert.
        progressbar: True shows a progress bar.
        compile_kwargs: arguments of `torch.compile` for the function that converts one layer; None does not compile.
        tolerance: largest relative error of a layer's change, in Frobenius norm; each layer gets the smallest rank
            that meets it.

    Returns:
        The LoRA's configuration, and {HF PEFT's key: tensor} in the type of the adapter's parameters. They belong
        together: without `rank`, the scaling is in the configuration.

    Warns:
        UserWarning: the adapter is a plain LoRA already.

    Raises:
        ConversionError: no LoRA can replace the adapter.
        ConfigError, MergeError: an argument is not valid, or the adapter cannot be merged.
    """
    if isinstance(rank, str):
        raise ConfigError(
            f"convert_to_lora: rank must be a number or None; got {rank!r:.200}; to add the LoRA to the model, call "
            "add_as_lora(model, adapter_name, new_name)"
        )
    plain = _plain_lora(model, adapter_name, rank, tolerance, progressbar, compile_kwargs)
    _warn_of_plain_lora(model, adapter_name)
    if has_prefix(model):
        return plain.config, plain.tensors
    return plain.config, {key.removeprefix(PREFIX): tensor for key, tensor in plain.tensors.items()}


def add_as_lora(
    model: nn.Module,
    adapter_name: str,
    new_name: str,
    rank: int | float | None = None,
    tolerance: float | None = None,
    is_trainable: bool = False,
) -> LowRankReport:
    """Add the LoRA of `convert_to_lora` to the model. Call `set_adapter(new_name)` to make it active.

    Args:
        model: a model with adapters.
        adapter_name: the adapter to convert; it stays unchanged.
        new_name: the new adapter's name.
        rank: as in `convert_to_lora`.
        tolerance: as in `convert_to_lora`.
        is_trainable: True to leave the new adapter trainable, False to freeze it.

    Returns:
        Rank and error of each layer.

    Raises:
        ConfigError, MergeError: no LoRA can replace the adapter; the model is unchanged.
    """
    plain = _plain_lora(model, adapter_name, rank, tolerance)
    plain.config.inference_mode = not is_trainable
    injection = prepare_injection(model, plain.config, new_name, Creation(initialise=False))
    state = AdapterState(injection.adapters, injection.biases, injection.copies, None)
    # an adapter that does not train may keep the tensors that it reads, and exact factors are the adapter's own
    own = {key: tensor.detach().clone() for key, tensor in plain.tensors.items()}
    state.read(state.with_our_keys(own, state.tensors(), new_name))
    commit_injection(model, injection, is_trainable)
    return plain.report


def save_as_lora(
    path: str | os.PathLike[str],
    model: nn.Module,
    rank: int | float | None = None,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
    *,
    tolerance: float | None = None,
) -> LowRankReport:
    """Write the LoRA of `convert_to_lora` as a directory; the adapter itself stays unchanged.

    Args:
        path: directory to write; an existing one is replaced, and stays if an error occurs.
        model: a model with adapters.
        rank: as in `convert_to_lora`.
        adapter_name: the adapter to convert; its trained biases are written too.
        progressbar: as in `convert_to_lora`.
        compile_kwargs: as in `convert_to_lora`.
        tolerance: as in `convert_to_lora`.

    Returns:
        Rank and error of each layer.

    Raises:
        ConfigError, MergeError: an argument is not valid, or no LoRA can replace the adapter.
    """
    if not isinstance(path, str | os.PathLike):
        raise ConfigError(f"save_as_lora takes the directory first, then the model; got {type(path).__name__}")
    plain = _plain_lora(model, adapter_name, rank, tolerance, progressbar, compile_kwargs)
    _warn_of_plain_lora(model, adapter_name)
    rows = embeddings_to_save(model, adapter_state_of(adapter_set(model), adapter_name), adapter_name, "auto")
    base = plain.config.base_model_name_or_path or getattr(model, "name_or_path", None) or None
    plain.config.base_model_name_or_path = base
    write_lora(plain.config, rows | plain.tensors, Path(path))
    return plain.report


def write_lora(config: LoraConfig, tensors: dict[str, Tensor], directory: Path) -> None:
    """Write an adapter directory in PEFT's format with a manifest; an existing directory is replaced."""
    saved = copy.copy(config)
    saved.inference_mode = True
    with directory_written_atomically(directory) as fresh:
        # safetensors refuses views and tensors that share memory, so each tensor is cloned
        plain = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in tensors.items()}
        save_file(plain, fresh / WEIGHTS_NAME, metadata={"format": "pt"})
        (fresh / CONFIG_NAME).write_text(saved.to_json(), encoding="utf-8")
        write_manifest(fresh)


def _plain_lora(
    model: nn.Module,
    name: str,
    rank: int | float | None,
    tolerance: float | None,
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> _PlainLora:
    layers, report = factors_by_layer(model, name, Limits.of(rank, tolerance), progressbar, compile_kwargs)
    if rank is not None:
        layers = {path: without_scaling(factors) for path, factors in layers.items()}
    adapters = adapter_set(model)
    if (adapters.copies(name) or adapters.biases(name)) and not any(own.rank for own in layers.values()):
        layers = {path: _zero(own) for path, own in layers.items()}  # a LoRA needs targets beside its saved modules
    bases = {path: adapter.base for path, adapter in adapters.adapters(name).items()}
    tensors = lora_tensors(layers, {path: (base.kind, base.kernel) for path, base in bases.items()})
    for path, module in adapters.copies(name).items():
        tensors |= {f"{PREFIX}{path}.{key}": tensor for key, tensor in module.state_dict().items()}
    for path, own in adapters.biases(name).items():
        inside = "base_layer." if path in layers and layers[path].rank else ""
        tensors[PREFIX + (path if own.base.kind == "parameter" else f"{path}.{inside}bias")] = own.bias.detach()
    return _PlainLora(lora_config(adapters.configs[name], layers, rank), tensors, report)


def _zero(factors: Factors) -> Factors:
    """Return factors of rank 1 that are zero, in place of factors of rank 0."""
    a, b = factors.a, factors.b
    return Factors(a.new_zeros(len(a), 1, a.shape[2]), b.new_zeros(len(b), b.shape[1], 1))


def _warn_of_plain_lora(model: nn.Module, name: str) -> None:
    adapters = adapter_set(model)
    config, layers = adapters.configs[name], adapters.adapters(name).values()
    is_plain = is_lora(config) and config.variants() == (config.initialisation(),)
    if is_plain and all(isinstance(layer, Lora) and layer.start is None for layer in layers):
        warnings.warn(
            f"adapter {name!r} is a plain LoRA already; its conversion is only needed to lower its rank", stacklevel=3
        )
