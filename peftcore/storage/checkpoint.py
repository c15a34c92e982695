"""Saving and loading PEFT's adapter directory.

The directory holds `adapter_config.json`, `adapter_model.safetensors`, a model card and a manifest of checksums. A key
on disk is `base_model.model.` + the module's path + the parameter, without the adapter's name.
"""

import dataclasses
import os
import warnings
from collections.abc import Callable, Container, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftcore._util.both_libraries import refuse_hf_peft
from peftcore.adapter import Adapter
from peftcore.config import CONFIG_NAME, PeftConfig, TaskType
from peftcore.errors import CheckpointError, ConfigError, PeftError, SizeMismatchError, TargetError
from peftcore.files import MANIFEST, damaged_files, files_written_together, manifest_text, sha256, whole_files
from peftcore.files.tensors import (
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
from peftcore.injection.adapter_set import ATTRIBUTE, AdapterSet, adapter_set
from peftcore.injection.inject import commit_injection, deepened
from peftcore.injection.module_index import ModuleIndex
from peftcore.injection.preparation import Creation, Injection, prepare_injection
from peftcore.injection.targets import PRE_CLASSIFIER, named
from peftcore.prompts.learner import PromptLearner
from peftcore.registry import method_of
from peftcore.storage.adapter_state import AdapterState, adapter_state_of
from peftcore.storage.embedding_rows import EmbeddingLoader, SaveEmbeddings, embeddings_to_save
from peftcore.storage.older_models import for_present_modules, under_new_names, with_fused_experts
from peftcore.storage.reading import IncompatibleKeys, Reading, under_this_head
from peftcore.storage.saved_module_names import with_exact_module_names, with_saved_module_names

_GENERATION = "text-generation"
"""The hub's name of a causal language model's task."""
_LARGE = 4096
"""Sizes up to this one are not checked before memory is allocated."""

_READING = Reading()
MODEL_CARD = "README.md"
_CARD = """\
---
{fields}
---

# {method} adapter

{trained}Load it onto that model with `PeftModel.from_pretrained(model, {directory})`.
"""


# -- contents of a checkpoint -----------------------------------------------------------------------------------------


def adapter_tensors(
    model: nn.Module,
    name: str,
    save_embedding_layers: SaveEmbeddings = False,
    available: Container[str] | None = None,
) -> dict[str, Tensor]:
    """Return everything that is saved for one adapter: {PEFT's key: tensor}.

    Args:
        model: The model with the adapter.
        name: The adapter's name.
        save_embedding_layers: See `peftcore.storage.embedding_rows`.
        available: Names of parameters; embeddings of the base that are not among them are left out. None: all.
    """
    state = adapter_state_of(adapter_set(model), name)
    embeddings = embeddings_to_save(model, state, name, save_embedding_layers)
    if available is not None:
        embeddings = {key: tensor for key, tensor in embeddings.items() if key.removeprefix(PREFIX) in available}
    return embeddings | state.tensors() | state.repetitions()


def adapter_state_dict(
    model: nn.Module, name: str, state_dict: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return the adapter's tensors by the model's own paths, as transformers does; without embeddings of the base.

    Args:
        model: The model with the adapter.
        name: The adapter's name.
        state_dict: State dict of the model with the values to use; None uses the model's own parameters.
    """
    adapter_set(model).require(name)
    reader = _Reader(model, name, save_embedding_layers=False)
    tensors, _ = reader() if state_dict is None else reader.with_values(state_dict)
    return {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}


def adapter_values(
    model: nn.Module, name: str, save_embedding_layers: SaveEmbeddings, state_dict: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return `adapter_tensors` with the values of a state dict of the model."""
    return _Reader(model, name, save_embedding_layers).with_values(state_dict)[0]


# -- writing ---------------------------------------------------------------------------------------------------------


def save_adapter(
    model: nn.Module,
    name: str,
    directory: Path,
    save_embedding_layers: SaveEmbeddings = "auto",
    state_dict: Mapping[str, Tensor] | None = None,
    writes: bool = True,
) -> None:
    """Write one adapter's directory atomically: after a kill, either the old or the new adapter is there.

    If the adapter is sharded (FSDP2), every process has to call this function; the first process writes all of it.

    Args:
        model: The model with the adapter.
        name: The adapter's name.
        directory: Folder to write; an adapter in it is replaced.
        save_embedding_layers: See `peftcore.storage.embedding_rows`.
        state_dict: State dict of the model with the values to use; None uses the model's own parameters.
        writes: False if this process only takes part in gathering shards.

    Raises:
        CheckpointError: If `directory` is a file, or `state_dict` lacks parameters of the adapter.
    """
    if directory.is_file():
        raise CheckpointError(f"{directory} is a file; give a directory to save the adapter in")
    adapters = adapter_set(model)
    adapters.require(name)
    config = adapters.configs[name]
    config = adapters.kinds[name].config_to_save(with_exact_module_names(config, model), adapters.of_method(name))
    base = config.base_model_name_or_path or getattr(model, "name_or_path", None) or None
    mapping = config.auto_mapping if config.task_type is not None else _auto_mapping(model)
    config = dataclasses.replace(config, inference_mode=True, base_model_name_or_path=base, auto_mapping=mapping)
    reader = _Reader(model, name, save_embedding_layers)
    held, held_state = reader() if state_dict is None else reader.with_values(state_dict)
    if unread := [key for key, tensor in held.items() if tensor.is_meta]:
        raise CheckpointError(
            f"adapter {name!r} has no values here: {unread[0]} is on the meta device. After low_cpu_mem_usage=True, "
            "read a saved adapter into it first; if accelerate has offloaded the model, call "
            "accelerate.hooks.remove_hook_from_submodules(model) first"
        )
    sharded = any(is_sharded(tensor) for tensor in held.values())
    if not sharded and not writes:
        return
    # cloned, because safetensors refuses views and tensors that share memory
    tensors = {k: whole(t.detach()).cpu().clone().contiguous() for k, t in held.items()}
    state = {k: whole(t.detach()).cpu().clone().contiguous() for k, t in held_state.items()}
    if not writes or (sharded and torch.distributed.get_rank()):
        return
    with files_written_together(directory, owned=[PROMPT_STATE]) as fresh:
        save_file(tensors, fresh / WEIGHTS_NAME, metadata={"format": "pt"})
        config.save_pretrained(fresh)  # a subclass may write further files
        if state:
            save_file(state, fresh / PROMPT_STATE, metadata={"format": "pt"})
        (fresh / MANIFEST).write_text(
            manifest_text({file.name: sha256(file) for file in sorted(fresh.iterdir())}), encoding="utf-8"
        )
        if not (directory / MODEL_CARD).exists():
            (fresh / MODEL_CARD).write_text(_card(model, config), encoding="utf-8")


def _base_name(model: nn.Module, config: PeftConfig) -> str | None:
    """Return the base model's name for the model card; None for a model that is not one of transformers, as in PEFT."""
    return (
        (config.base_model_name_or_path or getattr(model, "name_or_path", None)) if hasattr(model, "config") else None
    )


def _card(model: nn.Module, config: PeftConfig, directory: str = "directory") -> str:
    from huggingface_hub import ModelCardData

    base = _base_name(model, config)
    task = _GENERATION if config.task_type == TaskType.CAUSAL_LM else None
    tags = _tags(model, [config], base)
    fields = ModelCardData(library_name="peft", base_model=base, pipeline_tag=task, tags=tags).to_yaml()
    trained = f"Trained on `{base}`. " if base else ""
    return _CARD.format(fields=fields, trained=trained, method=config.peft_type.lower(), directory=directory)


def _tags(model: nn.Module, configs: Iterable[PeftConfig], base: str | None) -> list[str]:
    """Return the model's own tags, and those by which the hub finds the adapter of a base, as HF PEFT writes them."""
    tags = {config.peft_type.lower() for config in configs} | set(getattr(model, "model_tags", None) or ())
    tags |= {"transformers"} if isinstance(model, PreTrainedModel) else set()
    return sorted(tags | ({f"base_model:adapter:{base}"} if base else set()))


def _auto_mapping(model: nn.Module) -> dict[str, str]:
    """Return the class of the base model, as HF PEFT saves it for adapters without a task type."""
    return {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}


class _Reader(nn.Module):
    """Module whose forward returns an adapter's saved tensors, by PEFT's key, and a prompt's training state."""

    def __init__(self, model: nn.Module, name: str, save_embedding_layers: SaveEmbeddings):
        super().__init__()
        self.model = model
        self._name = name
        self._embeddings: SaveEmbeddings = save_embedding_layers

    def forward(self, available: Container[str] | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        prompt = adapter_set(self.model).prompt(self._name)
        tensors = adapter_tensors(self.model, self._name, self._embeddings, available)
        return tensors, {} if prompt is None else prompt.training_state()

    def with_values(self, state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the same tensors with the values of a state dict of the model, without embeddings that it lacks."""
        parameters = {name for name, _ in self.model.named_parameters()}
        trained = {id(p) for p in adapter_set(self.model).parameters(self._name)}
        needed = [name for name, parameter in self.model.named_parameters() if id(parameter) in trained]
        if missing := [name for name in needed if name not in state_dict]:
            raise CheckpointError(
                f"save_pretrained: state_dict lacks {missing[0]} ({len(missing)} of {len(needed)} of the adapter's "
                "parameters); give the result of the model's own state_dict(), or leave the argument out"
            )
        values = {f"model.{name}": tensor for name, tensor in state_dict.items() if name in parameters}
        return torch.func.functional_call(self, values, (state_dict,))


def update_model_card(model: nn.Module, directory: Path) -> None:
    """Add an adapter's fields to the model card of a directory; a new card if there is none."""
    from huggingface_hub import ModelCard

    adapters = adapter_set(model)
    name, config = next(iter(adapters.configs.items()))
    path = directory / MODEL_CARD
    if path.exists():
        card = ModelCard.load(path)
    else:
        card = ModelCard(_card(model, config, "directory" if "default" in adapters.configs else f"'directory/{name}'"))
    data: Any = card.data
    data.library_name = "peft"
    if (base := _base_name(model, config)) is not None:
        data.base_model = base
    if config.task_type == TaskType.CAUSAL_LM and not data.pipeline_tag:
        data.pipeline_tag = _GENERATION
    data.tags = sorted({*(data.tags or []), *_tags(model, adapters.configs.values(), base)})
    card.save(path)


# -- reading ---------------------------------------------------------------------------------------------------------


class Loaded(NamedTuple):
    """Result of `load_adapter`."""

    adapters: AdapterSet
    """The adapters of the model."""
    result: IncompatibleKeys


def load_adapter(
    model: nn.Module,
    directory: Path,
    name: str,
    trainable: bool,
    config: PeftConfig | None,
    tensors: dict[str, Tensor] | None = None,
    replaces_embeddings: bool = True,
    reading: Reading = _READING,
) -> Loaded:
    """Add the adapter of a directory to the model. On an error the model is unchanged.

    Args:
        model: The model, with or without adapters.
        directory: The adapter's directory.
        name: Name of the adapter in the model.
        trainable: True to train the adapter further.
        config: The adapter's configuration; None reads it from the directory.
        tensors: Tensors of the directory, if they have been read already; the adapter may keep them.
        replaces_embeddings: True if embeddings in the directory may replace the model's; False makes them an error.
        reading: Further options.

    Raises:
        CheckpointError: For damage, missing or unexpected keys.
        SizeMismatchError: For shapes of another base.
    """
    directory = whole_files(directory)
    if config is None:
        refuse_pickles(directory)
        config = PeftConfig.from_pretrained(directory)
    elif not isinstance(config, PeftConfig):
        refuse_hf_peft(config)
        raise ConfigError(f"config must be a configuration, such as LoraConfig(); got {config!r:.200}")
    config = dataclasses.replace(config, inference_mode=not trainable)
    with ThreadPoolExecutor(1, "adapter-reader") as executor, deepened(model, config) as replication:
        read = read_weights(directory) if tensors is None else None
        hashed = None if read is None else executor.submit(changed_files, directory, read)
        try:
            _check_sizes(config, directory, tensors if read is None else read)
            creation = Creation(reading.accepts_missing, reading.autocast_adapter_dtype, reading.low_cpu_mem_usage)

            def on_disk_now() -> Mapping[str, Tensor]:
                on_disk = (tensors or {}) if read is None else parsed(read, directory)
                is_prompt = issubclass(method_of(config).adapter, PromptLearner)
                return reading.prepared(on_disk, None if is_prompt else renamed_since(model))

            injection, state, on_disk = _prepared(model, config, name, creation, reading, on_disk_now)
            rows = EmbeddingLoader(
                lambda: injection.module_index, model.__dict__.get(ATTRIBUTE), name, replaces_embeddings
            )
            result = _take_tensors(model, state, rows, on_disk, directory, name, trainable, reading)
        except PeftError as error:
            if hashed is not None:
                hashed.result()  # damage of the directory is the more useful error
            if not isinstance(error, TargetError):
                raise
            raise CheckpointError(f"{directory} does not fit this {type(model).__name__}: {error}") from error
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            raise CheckpointError(
                f"{directory}: its {CONFIG_NAME} needs more memory than is available: {error}"
            ) from error
        if hashed is not None:
            warn_of_changes(directory, hashed.result())
        adapters = commit_injection(model, injection, trainable, replication)
        rows.replace(adapters)
    return Loaded(adapters, result)


def _prepared(
    model: nn.Module,
    config: PeftConfig,
    name: str,
    creation: Creation,
    reading: Reading,
    read_tensors: Callable[[], Mapping[str, Tensor]],
) -> tuple[Injection, AdapterState, Mapping[str, Tensor]]:
    """Return the prepared adapter, its state, and the directory's tensors.

    If they do not fit together, transformers may have renamed modules since, or HF PEFT's rule for `modules_to_save`
    matched more modules; see `for_present_modules` and `with_saved_module_names`.
    """
    on_disk: Mapping[str, Tensor] | None = None
    kind = method_of(config).adapter
    if issubclass(kind, Adapter):
        config = kind.config_of_file(config, read_tensors)
    try:
        injection = prepare_injection(model, config, name, creation)
        on_disk = read_tensors()
        injection = _without_later_head(injection, config, on_disk)
        state = _state_of(injection)
        fits = state.tensors().keys() == on_disk.keys()
    except TargetError:
        on_disk = read_tensors()
        present = _for_model(config, on_disk, model, reading)
        if present is config:
            raise
    else:
        present = config if fits else _for_model(config, on_disk, model, reading)
        if present is config:
            return injection, state, on_disk
    injection = _without_later_head(prepare_injection(model, present, name, creation), present, on_disk)
    return injection, _state_of(injection), on_disk


def _for_model(config: PeftConfig, on_disk: Mapping[str, Tensor], model: nn.Module, reading: Reading) -> PeftConfig:
    """Return the configuration with the names of this model's modules; unchanged if all names fit."""
    if reading.key_mapping is None:
        config = for_present_modules(config, on_disk, model)
    return with_saved_module_names(config, on_disk.keys(), model)


def _without_later_head(injection: Injection, config: PeftConfig, on_disk: Mapping[str, Tensor]) -> Injection:
    """Return an adapter without PRE_CLASSIFIER if neither the saved configuration nor the tensors have it.

    Earlier versions did not train that layer.
    """
    is_saved = named(PRE_CLASSIFIER, getattr(config, "modules_to_save", None))
    if is_saved or any(f".{PRE_CLASSIFIER}." in key for key in on_disk):
        return injection
    copies = {path: copy for path, copy in injection.copies.items() if not named(path, [PRE_CLASSIFIER])}
    if len(copies) == len(injection.copies):
        return injection
    completed: Any = injection.config
    names = [name for name in completed.modules_to_save if name != PRE_CLASSIFIER]
    return dataclasses.replace(injection, config=dataclasses.replace(completed, modules_to_save=names), copies=copies)


def _state_of(injection: Injection) -> AdapterState:
    return AdapterState(injection.adapters, injection.biases, injection.copies, injection.prompt)


def renamed_since(model: nn.Module) -> Mapping[str, str] | None:
    """Return a transformers model's {regular expression: replacement} of keys from before its modules were renamed."""
    return getattr(model, "_checkpoint_conversion_mapping", None)


def _check_sizes(config: PeftConfig, directory: Path, weights: memoryview | Mapping[str, Tensor] | None) -> None:
    """Raise CheckpointError if a stated size exceeds every dimension of the weights, before memory is allocated."""
    large = {name: size for name, size in config.sizes().items() if size > _LARGE}
    if not large:
        return
    tensors = parsed(weights, directory) if isinstance(weights, memoryview) else weights or {}
    most = max((max(tensor.shape, default=0) for tensor in tensors.values()), default=0)
    for name, size in large.items():
        if size > most:
            raise CheckpointError(
                f"{directory / CONFIG_NAME} has {name}={size}, but no tensor in {WEIGHTS_NAME} has more than {most} "
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
    reading: Reading = _READING,
) -> IncompatibleKeys:
    """Read a directory's tensors into an existing adapter with the same configuration.

    If the adapter is sharded, every process has to call this function and keeps its own part.

    Args:
        model: The model with the adapter.
        directory: The adapter's directory.
        name: Name of the adapter in the model.
        tensors: Tensors of the directory, if they have been read already.
        replaces_embeddings: See `load_adapter`.
        reading: Further options; those for new parameters have no meaning here.

    Raises:
        CheckpointError: For damage, missing or unexpected keys.
        SizeMismatchError: For shapes of another base.
    """
    adapters, directory = adapter_set(model), whole_files(directory)
    prompt = adapters.prompt(name)
    trains = prompt is not None and any(p.requires_grad for p in prompt.parameters())
    with writing_shards(adapters.parameters(name)), torch.no_grad():
        on_disk = read_tensors(directory) if tensors is None else tensors
        on_disk = reading.prepared(on_disk, renamed_since(model) if prompt is None else None)
        rows = EmbeddingLoader(lambda: ModuleIndex(model), adapters, name, replaces_embeddings)
        result = _take_tensors(model, adapter_state_of(adapters, name), rows, on_disk, directory, name, trains, reading)
        rows.replace(adapters)
    return result


def _take_tensors(
    model: nn.Module,
    state: AdapterState,
    rows: EmbeddingLoader,
    tensors: Mapping[str, Tensor],
    directory: Path,
    name: str,
    trainable: bool,
    reading: Reading,
) -> IncompatibleKeys:
    """Check all keys and shapes, then copy the adapter's tensors; `rows` checks the base's embeddings."""
    expected, file = state.tensors(), directory / WEIGHTS_NAME
    tensors = state.with_our_keys(tensors, expected, name)
    if not expected.keys() <= tensors.keys() and reading.key_mapping is None:
        tensors = with_fused_experts(under_new_names(tensors, expected.keys(), model), state, model)
        if reading.any_head and (trunk := getattr(model, "base_model_prefix", "")):
            tensors = under_this_head(tensors, expected.keys(), trunk)
    missing = sorted(expected.keys() - tensors.keys() - state.optional())
    others = tensors.keys() - expected.keys()
    others = others and others - state.repeated()
    unexpected = sorted(others and rows.take(state, {key: tensors[key] for key in others}, file))
    keys = f"{_listed('missing', missing)}{_listed('unexpected', unexpected)}"
    if keys and (reading.strict or expected.keys().isdisjoint(tensors)):
        if (former := state.former(unexpected)) is not None:
            raise CheckpointError(f"{file} does not fit: {keys}{former}")
        raise CheckpointError(
            f"{file} does not fit: {keys}the adapter belongs to another base model or another configuration; "
            "strict=False loads the tensors that fit"
        )
    wrong = {
        k: f"{k} is {list(tensors[k].shape)!s:.200}, here {list(t.shape)}"
        for k, t in expected.items()
        if k in tensors and tensors[k].shape != t.shape and not state.fits(k, tensors[k])
    }
    first_wrong = next(iter(wrong.values()), "")
    if wrong and not reading.ignore_mismatched_sizes:
        raise SizeMismatchError(
            f"{directory}: size mismatch; it belongs to another base model: {first_wrong} ({len(wrong)} tensors in all)"
        )
    if keys or wrong:
        warnings.warn(
            f"{file} is loaded without what does not fit: {keys}{first_wrong and f'{first_wrong}; '}parameters "
            "without a saved tensor have their initial values",
            stacklevel=4,
        )
    tensors = {**tensors, **{key: expected[key] for key in [*missing, *wrong]}}
    if state.prompt is not None:
        state.prompt.read(tensors, _prompt_state(directory), trainable)
    state.read(tensors)
    return IncompatibleKeys([state.parameter_name(key, name) for key in sorted({*missing, *wrong})], unexpected)


def _prompt_state(directory: Path) -> dict[str, Tensor]:
    """Return the training state of a prompt; {} if the directory has none.

    PEFT writes none. The state is also ignored if another program has saved a new prompt beside it.
    """
    path = directory / PROMPT_STATE
    if not os.path.lexists(path) or WEIGHTS_NAME in damaged_files(directory):
        return {}
    return parsed(read_file(path), directory, PROMPT_STATE)


def _listed(label: str, keys: list[str]) -> str:
    if not keys:
        return ""
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return f"{label} {', '.join(keys[:3])}{more}; "
