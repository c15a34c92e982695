"""PEFT's adapter directory, both ways: `adapter_config.json`, `adapter_model.safetensors`, a model card, a manifest.

A key on disk is `base_model.model.` + the module's path + the parameter, without the adapter's name.
"""

import dataclasses
import os
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from peftcore.adapter_set import AdapterSet, adapter_set
from peftcore.config import CONFIG_NAME, PeftConfig
from peftcore.content import Content, content_of
from peftcore.errors import CheckpointError, PeftError, TargetError
from peftcore.files import MANIFEST, flush_to_disk, manifest_text, sha256
from peftcore.inject import commit_injection, deepened
from peftcore.preparation import prepare_injection
from peftcore.tensors import (
    WEIGHTS_NAME,
    check_hashes,
    is_sharded,
    parsed,
    read_file,
    read_tensors,
    read_weights,
    refuse_pickles,
    whole,
    writing_shards,
)

PROMPT_STATE = "prompt_encoder.safetensors"
"""What a prompt is computed from; PEFT keeps the computed prompt alone, and reads past this file."""

_SIZES = ("r", "init_r", "n_frequency", "num_virtual_tokens", "num_vectors", "adapter_len")
"""Options that a dimension of some saved tensor repeats."""
_LARGE = 4096
"""Sizes up to this one are not looked at."""

MODEL_CARD = "README.md"
_CARD = """\
---
library_name: peft
base_model: {base}
tags: [{method}]
---

# {method} adapter

Trained on `{base}`. Load it onto that model with `PeftModel.from_pretrained(model, directory)`.
"""


# -- what is in a checkpoint -----------------------------------------------------------------------------------------


def adapter_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Everything saved for one adapter: {PEFT's key: tensor}."""
    return content_of(adapter_set(model), name).tensors()


# -- writing ---------------------------------------------------------------------------------------------------------


def save_adapter(model: nn.Module, name: str, directory: Path) -> None:
    """Write one adapter's directory; files that were there stay until every new one is whole on the disk.

    Where the adapter is sharded (FSDP2) every process calls this, and the first one writes the whole of it.
    """
    if directory.is_file():
        raise CheckpointError(f"{directory} is a file; give a directory to save the adapter in")
    adapters = adapter_set(model)
    adapters.require(name)
    config = adapters.configs[name]
    config = adapters.kinds[name].config_to_save(config, adapters.of_method(name))
    base = config.base_model_name_or_path or getattr(model, "name_or_path", None) or None
    config = dataclasses.replace(config, inference_mode=True, base_model_name_or_path=base)
    prompt = adapters.prompt(name)
    held = adapter_tensors(model, name)
    # a tensor may be a view or shared with another: cloned, so that safetensors gets plain memory of its own
    tensors = {k: whole(t.detach()).cpu().clone().contiguous() for k, t in held.items()}
    state = {} if prompt is None else {k: whole(t.detach()).cpu().clone() for k, t in prompt.training_state().items()}
    if any(is_sharded(tensor) for tensor in held.values()) and torch.distributed.get_rank():
        return
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".saving-") as made:
        fresh = Path(made)
        save_file(tensors, fresh / WEIGHTS_NAME, metadata={"format": "pt"})
        (fresh / CONFIG_NAME).write_text(config.to_json())
        written = [WEIGHTS_NAME, CONFIG_NAME]
        if state:
            save_file(state, fresh / PROMPT_STATE, metadata={"format": "pt"})
            written.append(PROMPT_STATE)
        hashed = list(written)
        if not (directory / MODEL_CARD).exists():
            (fresh / MODEL_CARD).write_text(_CARD.format(base=base or "unknown", method=config.peft_type.lower()))
            written.append(MODEL_CARD)
        (fresh / MANIFEST).write_text(manifest_text({file: sha256(fresh / file) for file in sorted(hashed)}))
        for file in (*written, MANIFEST):
            flush_to_disk(fresh / file)
        if not state:
            (directory / PROMPT_STATE).unlink(missing_ok=True)
        for file in (*written, MANIFEST):
            (fresh / file).chmod(0o644)
            (fresh / file).replace(directory / file)
    flush_to_disk(directory)


def update_model_card(model: nn.Module, directory: Path) -> None:
    """Give a model card that somebody else has written the fields of an adapter's."""
    from huggingface_hub import ModelCard

    adapters = adapter_set(model)
    config = next(iter(adapters.configs.values()))
    card = ModelCard.load(directory / MODEL_CARD)
    data: Any = card.data
    data.library_name = "peft"
    data.base_model = config.base_model_name_or_path or getattr(model, "name_or_path", None) or "unknown"
    data.tags = sorted({*(data.tags or []), *(c.peft_type.lower() for c in adapters.configs.values())})
    card.save(directory / MODEL_CARD)


# -- reading ---------------------------------------------------------------------------------------------------------


def load_adapter(
    model: nn.Module,
    directory: Path,
    name: str,
    trainable: bool,
    config: PeftConfig | None,
    tensors: dict[str, Tensor] | None = None,
) -> AdapterSet:
    """Make an adapter from its directory and put it into the model; on any error the model is as it was.

    tensors: those of the directory, where they have been read already; they are the adapter's from then on.
    Raises CheckpointError for damage, missing or unexpected keys, or shapes of another base.
    """
    if config is None:
        refuse_pickles(directory)
        config = PeftConfig.from_pretrained(directory)
    config = dataclasses.replace(config, inference_mode=not trainable)
    with ThreadPoolExecutor(1, "adapter-reader") as beside, deepened(model, config) as replication:
        read = read_weights(directory) if tensors is None else None
        hashed = None if read is None else beside.submit(check_hashes, directory, read)
        try:
            _refuse_hollow_sizes(config, directory, tensors if read is None else read)
            injection = prepare_injection(model, config, name, fresh=False)
            content = Content(injection.adapters, injection.biases, injection.copies, injection.prompt)
            given = (tensors or {}) if read is None else parsed(read, directory)
            _take_tensors(content, given, directory, trainable)
        except PeftError as error:
            if hashed is not None:
                hashed.result()  # a damaged directory is what has to be said first
            if not isinstance(error, TargetError):
                raise
            raise CheckpointError(f"{directory} does not fit this {type(model).__name__}: {error}") from error
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            raise CheckpointError(
                f"{directory}: its {CONFIG_NAME} asks for more memory than there is: {error}"
            ) from error
        if hashed is not None:
            hashed.result()
        return commit_injection(model, injection, trainable, replication)


def _refuse_hollow_sizes(config: PeftConfig, directory: Path, held: memoryview | Mapping[str, Tensor] | None) -> None:
    """CheckpointError where a rank is said to be larger than all that the weights hold, before memory is taken."""
    said = {name: size for name in _SIZES if isinstance(size := getattr(config, name, None), int)}
    for pattern in ("rank_pattern", "n_frequency_pattern"):
        of_layers = (getattr(config, pattern, None) or {}).items()  # AdaLoRA's are masks
        said |= {f"{pattern}[{key!r}]": size for key, size in of_layers if isinstance(size, int)}
    large = {name: size for name, size in said.items() if size > _LARGE}
    if not large or config.peft_type == "LOKR":  # where a rank above all sizes means full matrices
        return
    tensors = parsed(held, directory) if isinstance(held, memoryview) else held or {}
    most = max((max(tensor.shape, default=0) for tensor in tensors.values()), default=0)
    for name, size in large.items():
        if size > most:
            raise CheckpointError(
                f"{directory / CONFIG_NAME} says {name}={size}, but no tensor in {WEIGHTS_NAME} has more than {most} "
                "rows or columns; the two do not belong together"
            )


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "alloc" in str(error)


def load_adapter_weights(
    model: nn.Module, directory: Path, name: str, tensors: dict[str, Tensor] | None = None
) -> None:
    """Read a directory's tensors into an adapter that is there already, made with the same configuration.

    tensors: those of the directory, where they have been read already.
    Where the adapter is sharded every process calls this, and keeps its own part.
    """
    adapters = adapter_set(model)
    prompt = adapters.prompt(name)
    trains = prompt is not None and any(p.requires_grad for p in prompt.parameters())
    with writing_shards(adapters.parameters(name)), torch.no_grad():
        given = read_tensors(directory) if tensors is None else tensors
        _take_tensors(content_of(adapters, name), given, directory, trains)


def _take_tensors(content: Content, tensors: Mapping[str, Tensor], directory: Path, trainable: bool) -> None:
    """Check all keys and shapes, then copy."""
    expected, tensors = content.tensors(), content.spelled(tensors)
    missing = sorted(expected.keys() - tensors.keys() - content.optional())
    others = tensors.keys() - expected.keys()
    others = others and others - content.repeated()
    unexpected = sorted(key for key in others if not _is_base(key))
    if missing or unexpected:
        raise CheckpointError(
            f"{directory / WEIGHTS_NAME} does not fit: {_listed('missing', missing)}{_listed('unexpected', unexpected)}"
            "it was made for another base model or another configuration"
        )
    wrong = [
        f"{k} is {list(tensors[k].shape)!s:.200}, here {list(t.shape)}"
        for k, t in expected.items()
        if k in tensors and tensors[k].shape != t.shape and not content.fits(k, tensors[k])
    ]
    if wrong:
        raise CheckpointError(f"{directory} was made for another base model: {wrong[0]} ({len(wrong)} tensors in all)")
    if content.prompt is not None:
        content.prompt.read(tensors, _prompt_state(directory), trainable)
    content.read(tensors)


def _prompt_state(directory: Path) -> dict[str, Tensor]:
    """What a prompt learner goes on training with, {} where the directory holds none (PEFT's does not)."""
    path = directory / PROMPT_STATE
    return parsed(read_file(path), directory, PROMPT_STATE) if os.path.lexists(path) else {}


def _is_base(key: str) -> bool:
    """PEFT also saves the base weight of a targeted embedding; that is the base's, not the adapter's."""
    return key.endswith(".base_layer.weight")


def _listed(what: str, keys: list[str]) -> str:
    if not keys:
        return ""
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return f"{what} {', '.join(keys[:3])}{more}; "
