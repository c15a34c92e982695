"""The canonical LoRA, which every runtime reads alike: y = Wx + BAx with one rank for all layers, and α = rank.

Smaller ranks are padded by rows of zeros in A and columns of zeros in B. The scaling (α/r, α/√r, a layer's pattern, or
AdaLoRA's) is multiplied into B. So the result is correct in a runtime that knows neither rsLoRA nor patterns.

Shapes: i in_features, o out_features, r rank; on an embedding of v rows of size d: A (r, v), B (d, r).
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.config import PeftConfig, TaskType
from peftcore.conversion.layer_factors import exact_factors
from peftcore.errors import CheckpointError, ConversionError, ExportError, MergeError
from peftcore.files.tensors import PREFIX, read_tensors
from peftcore.injection.adapter_set import adapter_set
from peftcore.kernels.factors import Factors, padded
from peftcore.merging.convertible import check_convertible
from peftcore.methods.lora import LoraConfig, is_lora

_EMBEDDING = ".lora_embedding_A"
_TARGETED_ROWS, _ROWS = ".base_layer.weight", ("embed_tokens.weight", "lm_head.weight")
"""Key endings of embeddings that `save_embedding_layers` saves: of layers that the adapter targets, and of others."""


@dataclass(frozen=True)
class CanonicalLora:
    """A LoRA with α = rank, so that each layer adds BA to its weight."""

    layers: dict[str, tuple[Tensor, Tensor]]
    """{path: (A (r, i), B (o, r))}, float32 on the CPU."""
    rank: int
    embeddings: frozenset[str]
    """Paths whose layer is an embedding."""
    task_type: str | None = None
    base: str | None = None
    """`base_model_name_or_path`."""
    revision: str | None = None


@torch.no_grad()
def canonicalise(
    source: nn.Module | str | Path, adapter_name: str = "default", rank: int | None = None
) -> CanonicalLora:
    """Return the canonical LoRA of an adapter.

    Args:
        source: a model with a LoRA, AdaLoRA or VeRA adapter, or a directory of LoRA or AdaLoRA.
        adapter_name: the model's adapter; ignored for a directory.
        rank: rank of all layers (count); None: the largest rank of a layer.

    Raises:
        ExportError: the adapter is not a LoRA of linear layers and embeddings alone (DoRA, aLoRA, saved modules,
            trained biases, experts, convolutions, prompts, other methods), or is merged now. The message says what to
            do instead.
    """
    if isinstance(source, nn.Module):
        config = adapter_set(source).configs.get(adapter_name)
        adapter_set(source).require(adapter_name)
        layers, embeddings = _of_model(source, adapter_name)
    else:
        config = PeftConfig.from_pretrained(source)
        layers, embeddings = _of_directory(config, Path(source))
    assert config is not None
    layers = {path: _unscaled(own) for path, own in layers.items() if own.rank}
    if not layers:
        raise ExportError("every layer of this adapter has rank 0, so it changes nothing; there is nothing to export")
    most = max(own.rank for own in layers.values())
    if rank is not None and rank < most:
        raise ExportError(
            f"rank {rank} is below the adapter's {most}; give at least that, or "
            "add_as_lora(model, name, new_name, rank=...)"
        )
    layers = {path: padded(own, rank or most) for path, own in layers.items()}
    tensors = {path: (own.a[0].contiguous(), own.b[0].contiguous()) for path, own in layers.items()}
    task = None if config.task_type is None else TaskType(config.task_type).value
    base = config.base_model_name_or_path or getattr(source, "name_or_path", None) or None
    return CanonicalLora(tensors, rank or most, frozenset(embeddings), task, base, config.revision)


def _of_model(model: nn.Module, name: str) -> tuple[dict[str, Factors], set[str]]:
    adapters = adapter_set(model)
    if adapters.replaced_rows:
        raise ExportError(
            "the adapter's directory holds embeddings of the base that differ from the base's own, and a LoRA cannot "
            "hold them; merge the adapter into the base instead"
        )
    config: Any = adapters.configs[name]
    own = adapters.adapters(name)
    check_plain(config)
    try:
        check_convertible(model, name)
    except (ConversionError, MergeError) as error:
        raise ExportError(f"no LoRA equals the adapter: {error}") from error
    if adapters.copies(name) or adapters.biases(name):
        raise ExportError(_SAVED_MODULES)
    layers = {}
    for path, adapter in own.items():
        if adapter.base.kind not in ("linear", "embedding"):
            raise ExportError(f"{path} is a {adapter.base.kind}, which LoRA runtimes do not adapt; merge the adapter")
        factors = exact_factors(adapter)
        if factors is None:
            raise ExportError(_not_low_rank(type(adapter).__name__))
        layers[path] = factors
    return layers, {path for path, adapter in own.items() if adapter.base.kind == "embedding"}


def check_plain(config: PeftConfig) -> None:
    """Check that a configuration has no option beyond plain LoRA. Raises ExportError, which says what to do instead."""
    if reason := config.beyond_low_rank():
        raise ExportError(reason)
    if config.modules_to_save:
        raise ExportError(_SAVED_MODULES)
    if config.bias != "none":
        raise ExportError("the adapter trains biases, which LoRA runtimes do not read; merge it into the base instead")
    for option in ("target_parameters", "layer_replication", "trainable_token_indices"):
        if getattr(config, option):
            raise ExportError(f"{option} is not read by LoRA runtimes; merge the adapter into the base instead")


_SAVED_MODULES = (
    "the adapter holds trained modules or biases (modules_to_save, a task head), which LoRA runtimes do not read; "
    "merge it into the base instead"
)


def _not_low_rank(method: str) -> str:
    return (
        f"{method} is not low-rank; convert it by add_as_lora(model, name, new_name, rank=...) and export the "
        "result, or merge it into the base"
    )


def _of_directory(config: PeftConfig, directory: Path) -> tuple[dict[str, Factors], set[str]]:
    check_plain(config)
    tensors = read_tensors(directory)
    layers = config.take_factors({key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()})
    if layers is not None:
        return layers, set()
    if not is_lora(config):
        raise ExportError(f"{directory} holds a {config.method} adapter. {_not_low_rank(config.method)}")
    if config.initialisation().subtracts or config.replaces_base:  # HF PEFT writes the factors, not the changed base
        raise ExportError(
            f"{directory}: init_lora_weights={config.init_lora_weights!r} subtracts a residual from the base; load "
            "the adapter onto the model and export it from there"
        )
    if config.packs_factors:
        raise ExportError(
            f"{directory} holds parts of A or B (BD-LoRA, QA-LoRA); load the adapter onto the model and export it from "
            "there"
        )
    return _lora_factors(config, tensors, directory)


def _lora_factors(
    config: LoraConfig, tensors: Mapping[str, Tensor], directory: Path
) -> tuple[dict[str, Factors], set[str]]:
    layers, embeddings, read = {}, set(), set()
    for key, a in tensors.items():
        ending = next((end for end in (".lora_A.weight", _EMBEDDING) if key.endswith(end)), None)
        if ending is None:
            continue
        path = key.removeprefix(PREFIX).removesuffix(ending)
        other = key.removesuffix(ending) + ending.replace("A", "B")
        if other not in tensors or a.dim() != 2:
            problem = "has no B" if other not in tensors else "is a convolution, which LoRA runtimes do not adapt"
            raise ExportError(f"{directory}: {path} {problem}; merge the adapter into the base instead")
        read |= {key, other}
        layers[path] = Factors(a[None], tensors[other][None], config.at(path)[1] / config.denominator(len(a)))
        embeddings |= {path} if ending == _EMBEDDING else set()
    left = sorted(key for key in tensors if key not in read and not key.endswith(_TARGETED_ROWS))
    if left and all(key.endswith(_ROWS) for key in left):
        raise ExportError(
            f"{directory} holds embeddings of the base ({left[0]}), which may differ from the base's own (a resized "
            "vocabulary); load the adapter onto the model and export it from there, which compares them"
        )
    if targeted := sorted(key for key in tensors if key.endswith(_TARGETED_ROWS)):
        warnings.warn(
            f"{directory} holds embeddings of the base ({targeted[0]}), which are not exported and not compared; if "
            "the base's own may differ, load the adapter onto the model and export it from there",
            stacklevel=4,
        )
    if left:
        raise ExportError(f"{directory} holds {left[0]}, which is not a factor of a LoRA; {_SAVED_MODULES}")
    if not layers:
        raise CheckpointError(f"{directory} holds no LoRA tensors; give the directory that save_pretrained wrote")
    return layers, embeddings


def _unscaled(factors: Factors) -> Factors:
    """Return the factors in float32 on the CPU, with the scaling in B."""
    return Factors(factors.a.detach().float().cpu(), factors.b.detach().float().cpu() * factors.scaling)
