"""PEFT's adapter directory, both ways: `adapter_config.json`, `adapter_model.safetensors`, a model card, a manifest.

A key on disk is `base_model.model.` + the module's path + the parameter, without the adapter's name.
"""

import dataclasses
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from peftcore._util.tensors import (
    PREFIX,
    PROMPT_STATE,
    WEIGHTS_NAME,
    changed_files,
    is_sharded,
    parsed,
    read_file,
    read_tensors,
    read_weights,
    refuse_pickles,
    warn_of_changes,
    whole,
    writing_shards,
)
from peftcore.config import CONFIG_NAME, PeftConfig
from peftcore.errors import CheckpointError, PeftError, TargetError
from peftcore.files import MANIFEST, damaged_files, files_written_together, manifest_text, sha256, whole_files
from peftcore.injection.adapter_set import ATTRIBUTE, AdapterSet, adapter_set
from peftcore.injection.inject import commit_injection, deepened
from peftcore.injection.module_index import ModuleIndex
from peftcore.injection.preparation import prepare_injection
from peftcore.storage.adapter_state import Content, content_of
from peftcore.storage.embedding_rows import Embeddings, SaveEmbeddings, embeddings_to_save

_LARGE = 4096
"""Sizes up to this one are not checked before memory is allocated."""

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


def adapter_tensors(model: nn.Module, name: str, save_embedding_layers: SaveEmbeddings = False) -> dict[str, Tensor]:
    """Everything saved for one adapter: {PEFT's key: tensor}."""
    content = content_of(adapter_set(model), name)
    return embeddings_to_save(model, content, name, save_embedding_layers) | content.tensors()


def adapter_state_dict(
    model: nn.Module, name: str, state_dict: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """`adapter_tensors` without what is saved of the base, by the model's own paths, as transformers has them.

    state_dict: the model's, to take the values from; None: the model's own parameters.
    """
    adapter_set(model).require(name)
    reader = _Reader(model, name, save_embedding_layers=False)
    tensors, _ = reader() if state_dict is None else reader.with_values(state_dict)
    return {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}


# -- writing ---------------------------------------------------------------------------------------------------------


def save_adapter(
    model: nn.Module,
    name: str,
    directory: Path,
    save_embedding_layers: SaveEmbeddings = "auto",
    state_dict: Mapping[str, Tensor] | None = None,
    writes: bool = True,
) -> None:
    """Write one adapter's directory, whole: if the process is killed, the old adapter or the new one is there.

    Where the adapter is sharded (FSDP2) every process calls this, and the first one writes the whole of it.

    Args:
        save_embedding_layers: see `peftcore.storage.embedding_rows`.
        state_dict: the model's, to take the values from; None: the model's own parameters.
        writes: whether this process writes; False only takes part in gathering shards.
    """
    if directory.is_file():
        raise CheckpointError(f"{directory} is a file; give a directory to save the adapter in")
    adapters = adapter_set(model)
    adapters.require(name)
    config = adapters.configs[name]
    config = adapters.kinds[name].config_to_save(config, adapters.of_method(name))
    base = config.base_model_name_or_path or getattr(model, "name_or_path", None) or None
    config = dataclasses.replace(config, inference_mode=True, base_model_name_or_path=base)
    reader = _Reader(model, name, save_embedding_layers)
    held, held_state = reader() if state_dict is None else reader.with_values(state_dict)
    sharded = any(is_sharded(tensor) for tensor in held.values())
    if not sharded and not writes:
        return
    # a tensor may be a view or shared with another: cloned, so that safetensors gets plain memory of its own
    tensors = {k: whole(t.detach()).cpu().clone().contiguous() for k, t in held.items()}
    state = {k: whole(t.detach()).cpu().clone().contiguous() for k, t in held_state.items()}
    if not writes or (sharded and torch.distributed.get_rank()):
        return
    with files_written_together(directory, owned=[PROMPT_STATE]) as fresh:
        save_file(tensors, fresh / WEIGHTS_NAME, metadata={"format": "pt"})
        (fresh / CONFIG_NAME).write_text(config.to_json())
        if state:
            save_file(state, fresh / PROMPT_STATE, metadata={"format": "pt"})
        (fresh / MANIFEST).write_text(manifest_text({file.name: sha256(file) for file in sorted(fresh.iterdir())}))
        if not (directory / MODEL_CARD).exists():
            (fresh / MODEL_CARD).write_text(_CARD.format(base=base or "unknown", method=config.peft_type.lower()))


class _Reader(nn.Module):
    """What is saved of one adapter: its tensors by PEFT's key, and what a prompt is computed from."""

    def __init__(self, model: nn.Module, name: str, save_embedding_layers: SaveEmbeddings):
        super().__init__()
        self.model = model
        self._name = name
        self._embeddings: SaveEmbeddings = save_embedding_layers

    def forward(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        prompt = adapter_set(self.model).prompt(self._name)
        tensors = adapter_tensors(self.model, self._name, self._embeddings)
        return tensors, {} if prompt is None else prompt.training_state()

    def with_values(self, state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The same with the values of a state dictionary of the model in place of the model's own."""
        own = {name for name, _ in self.model.named_parameters()}
        trained = {id(p) for p in adapter_set(self.model).parameters(self._name)}
        needed = [name for name, parameter in self.model.named_parameters() if id(parameter) in trained]
        if missing := [name for name in needed if name not in state_dict]:
            raise CheckpointError(
                f"save_pretrained: state_dict lacks {missing[0]} ({len(missing)} of {len(needed)} of the adapter's "
                "parameters); give what the model's own state_dict() gives, or leave it out"
            )
        values = {f"model.{name}": tensor for name, tensor in state_dict.items() if name in own}
        return torch.func.functional_call(self, values, ())


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
    replaces_embeddings: bool = True,
) -> AdapterSet:
    """Make an adapter from its directory and put it into the model; on any error the model is as it was.

    tensors: those of the directory, where they have been read already; they are the adapter's from then on.
    replaces_embeddings: whether the base's embeddings in a directory may replace others in the model; False: an error.
    Raises CheckpointError for damage, missing or unexpected keys, or shapes of another base.
    """
    directory = whole_files(directory)
    if config is None:
        refuse_pickles(directory)
        config = PeftConfig.from_pretrained(directory)
    config = dataclasses.replace(config, inference_mode=not trainable)
    with ThreadPoolExecutor(1, "adapter-reader") as beside, deepened(model, config) as replication:
        read = read_weights(directory) if tensors is None else None
        hashed = None if read is None else beside.submit(changed_files, directory, read)
        try:
            _refuse_hollow_sizes(config, directory, tensors if read is None else read)
            injection = prepare_injection(model, config, name, fresh=False)
            content = Content(injection.adapters, injection.biases, injection.copies, injection.prompt)
            given = (tensors or {}) if read is None else parsed(read, directory)
            rows = Embeddings(lambda: injection.module_index, model.__dict__.get(ATTRIBUTE), name, replaces_embeddings)
            _take_tensors(content, rows, given, directory, trainable)
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
            warn_of_changes(directory, hashed.result())
        adapters = commit_injection(model, injection, trainable, replication)
        rows.replace(adapters)
    return adapters


def _refuse_hollow_sizes(config: PeftConfig, directory: Path, held: memoryview | Mapping[str, Tensor] | None) -> None:
    """Raise CheckpointError if a stated size exceeds every dimension of the weights, before memory is allocated."""
    large = {name: size for name, size in config.sizes().items() if size > _LARGE}
    if not large:
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
    model: nn.Module,
    directory: Path,
    name: str,
    tensors: dict[str, Tensor] | None = None,
    replaces_embeddings: bool = True,
) -> None:
    """Read a directory's tensors into an adapter that is there already, made with the same configuration.

    tensors: those of the directory, where they have been read already. replaces_embeddings: see `load_adapter`.
    Where the adapter is sharded every process calls this, and keeps its own part.
    """
    adapters, directory = adapter_set(model), whole_files(directory)
    prompt = adapters.prompt(name)
    trains = prompt is not None and any(p.requires_grad for p in prompt.parameters())
    with writing_shards(adapters.parameters(name)), torch.no_grad():
        given = read_tensors(directory) if tensors is None else tensors
        rows = Embeddings(lambda: ModuleIndex(model), adapters, name, replaces_embeddings)
        _take_tensors(content_of(adapters, name), rows, given, directory, trains)
        rows.replace(adapters)


def _take_tensors(
    content: Content, rows: Embeddings, tensors: Mapping[str, Tensor], directory: Path, trainable: bool
) -> None:
    """Check all keys and shapes, then copy the adapter's own, and let `rows` take those of the base's embeddings."""
    expected, tensors = content.tensors(), content.spelled(tensors)
    missing = sorted(expected.keys() - tensors.keys() - content.optional())
    others = tensors.keys() - expected.keys()
    others = others and others - content.repeated()
    unexpected = sorted(others and rows.take(content, {key: tensors[key] for key in others}, directory / WEIGHTS_NAME))
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
    """What a prompt learner goes on training with; {} where the directory holds none, as PEFT's does not, or where
    the prompt beside it was saved anew by a program that leaves this file as it was."""
    path = directory / PROMPT_STATE
    if not os.path.lexists(path) or WEIGHTS_NAME in damaged_files(directory):
        return {}
    return parsed(read_file(path), directory, PROMPT_STATE)


def _listed(what: str, keys: list[str]) -> str:
    if not keys:
        return ""
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return f"{what} {', '.join(keys[:3])}{more}; "
