"""Embeddings of the base that a directory holds beside its adapter, for example of a resized vocabulary.

This is PEFT's `save_embedding_layers`. On disk the embeddings have the base's own keys: `<path>.weight` for an
embedding or output head without adapter, `<path>.base_layer.weight` for one with an adapter.

When such a directory is loaded, the saved embeddings replace the model's own, for every adapter and for the base, as in
PEFT. `unload`, and deleting the last adapter, restore the model's own embeddings.
"""

import re
import warnings
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peftcore.bases import base_weight, is_adaptable
from peftcore.bases.base import UNMERGED_STATE
from peftcore.config import PeftConfig
from peftcore.errors import CheckpointError, ConfigError
from peftcore.files.tensors import is_sharded, whole
from peftcore.injection.adapter_set import AdapterSet, ReplacedRows, adapter_set
from peftcore.injection.module_index import ModuleIndex
from peftcore.layers.wrapper import unwrapped
from peftcore.storage.adapter_state import AdapterState

SaveEmbeddings = bool | Literal["auto"]
"""Value of `save_embedding_layers`."""
_NAMES = ("embed_tokens", "lm_head")
"""Names of embeddings that PEFT saves if an adapter targets them."""
_KEY = re.compile(r"(?P<path>.+?)(\.token_adapter)?(?P<inside>\.base_layer|\.original_module)?\.(?P<name>weight|bias)")


# -- saving ----------------------------------------------------------------------------------------------------------


def embeddings_to_save(model: nn.Module, state: AdapterState, name: str, choice: SaveEmbeddings) -> dict[str, Tensor]:
    """Return {PEFT's key: tensor} of the embeddings to save in an adapter's directory.

    Args:
        model: The model with the adapter.
        state: The adapter's state.
        name: The adapter's name.
        choice: `save_embedding_layers`. "auto" saves embeddings that the adapter targets. It saves all embeddings if
            the vocabulary's size differs from that of `base_model_name_or_path`, or if loading replaced embeddings.
    """
    if choice not in (True, False, "auto"):
        raise ConfigError(f"save_embedding_layers must be True, False or 'auto'; got {choice!r}")
    if choice is False:
        return {}
    adapters = adapter_set(model)
    config = adapters.configs[name]
    paths = adapters.adapters(name) if not config.trains_single_rows else {}
    targeted = {path for path in paths if path.rpartition(".")[2] in _NAMES}
    resized = choice is True and bool(adapters.replaced_rows)
    if choice == "auto":
        resized = bool(adapters.replaced_rows) or _was_resized(model, config)
        if not resized and not targeted:
            return {}
    module_index = ModuleIndex(model)
    ends = embedding_paths(module_index)
    if not ends:
        if choice is True:
            raise ConfigError(
                f"save_embedding_layers=True: this {type(model).__name__} names no embeddings (get_input_embeddings, "
                "get_output_embeddings); leave it at 'auto', or train them as modules_to_save"
            )
        return {}
    copies, targeted = adapters.copies(name), targeted & ends.keys()
    tensors: dict[str, Tensor] = {}
    saved: set[int] = set()
    for path, module in sorted(ends.items(), key=lambda end: end[0] not in targeted):
        weight = id(unwrapped(module)._parameters.get("weight"))
        # as in PEFT, an embedding beside a targeted one is omitted, unless its rows would be lost
        if path in copies or (targeted and path not in targeted and (not resized or weight in saved)):
            continue
        saved.add(weight)
        tensors |= {
            f"{state.base_prefix(path)}{key}": tensor for key, tensor in _own_tensors(unwrapped(module)).items()
        }
    return tensors


def _own_tensors(layer: nn.Module) -> dict[str, Tensor]:
    """Return the unmerged weight and bias of a layer, as the layer stores them, dense."""
    own = {name: p.detach() for name, p in layer._parameters.items() if p is not None}
    if is_adaptable(layer):
        base, aside = base_weight(layer), layer.__dict__.get(UNMERGED_STATE, {})
        own |= {name: base.stored(aside, name).detach() for name in own if name in aside}
        if base.quantized:
            own["weight"] = base.read_unmerged().detach()
    return own


def _can_be_looked_up(base: str | None) -> bool:
    """Return True if a base model's name is a folder or may be on the hub; "wheel:NAME" is neither."""
    return bool(base) and (Path(base).is_dir() or ":" not in base)


def _was_resized(model: nn.Module, config: PeftConfig) -> bool:
    """Return True if the vocabulary's size differs from that of the base model that the configuration names."""
    own = getattr(model, "config", None)
    base = config.base_model_name_or_path or getattr(model, "name_or_path", None)
    if getattr(own, "vocab_size", None) is None or not hasattr(own, "from_pretrained") or not _can_be_looked_up(base):
        return False
    place: dict[str, Any] = {"revision": config.revision, "local_files_only": True}
    try:
        # transformers makes a configuration of default values for a folder without config.json, such as a pipeline's
        found = bool(type(own).get_config_dict(base, **place)[0])  # type: ignore[union-attr]
    except (OSError, ValueError):
        found = False
    if not found:
        warnings.warn(
            f"the base model's config.json is not found at {base!r}, so the vocabulary is assumed to have its original "
            "size; if you have resized it, save with save_embedding_layers=True",
            stacklevel=6,
        )
        return False
    return type(own).from_pretrained(base, **place).vocab_size != own.vocab_size  # type: ignore[union-attr]


def embedding_paths(module_index: ModuleIndex) -> dict[str, nn.Module]:
    """Return {path: module} of the model's input and output embeddings, each at its first path."""
    ends: dict[str, nn.Module] = {}
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            end = getattr(module_index.model, getter)()
        except (AttributeError, NotImplementedError):  # not a transformers model, or one without this embedding
            continue
        path = next((path for path, module in module_index.modules.items() if module is end), None)
        if path is not None:
            ends[path] = end
    return ends


# -- loading ---------------------------------------------------------------------------------------------------------


class EmbeddingLoader:
    """Loader of the base's embeddings in a directory; all checks come before the first change.

    Args:
        module_index: Returns the model's index; called only if a directory holds embeddings.
        adapters: Adapters in the model; None for a model without adapters.
        name: Name of the adapter that is being loaded.
        may_replace: False if the model's own embeddings must stay.
    """

    def __init__(
        self, module_index: Callable[[], ModuleIndex], adapters: AdapterSet | None, name: str, may_replace: bool
    ):
        self._walk, self._may_replace = module_index, may_replace
        self._others = [] if adapters is None else [other for other in adapters.configs if other != name]
        self._new: dict[int, nn.Parameter] = {}
        """{id of a parameter: its replacement}"""

    @cached_property
    def _places(self) -> ModuleIndex:
        return self._walk()

    def take(self, state: AdapterState, tensors: Mapping[str, Tensor], file: Path) -> set[str]:
        """Check the embeddings among a directory's tensors, without changing the model.

        Returns:
            The keys that are not embeddings.

        Raises:
            CheckpointError: For another shape, or if replacing the embeddings would change other adapters.
        """
        ends = embedding_paths(self._places)
        wrapped, foreign = state.paths() | ends.keys(), set()
        for key, saved in tensors.items():
            match = _KEY.fullmatch(key.removeprefix(state.path_prefix))
            if match is None or match["path"] not in (wrapped if match["inside"] else ends):
                foreign.add(key)
                continue
            try:
                self._take_one(match["path"], match["name"], saved)
            except CheckpointError as error:
                raise CheckpointError(f"{file}: {error}") from error
        return foreign

    def _take_one(self, path: str, name: str, saved: Tensor) -> None:
        layer = unwrapped(self._places.at(path))
        parameter = layer._parameters.get(name)
        if parameter is None:
            raise CheckpointError(
                f"{path}.{name} is saved, but the model's {path} has none; load the adapter onto its own base"
            )
        own = _own_tensors(layer)[name]
        if own.shape != saved.shape:
            raise CheckpointError(_other_shape(path, saved, own))
        if torch.equal(whole(own), saved.to(own.device, own.dtype)):
            return
        difference = "the saved embeddings differ from the model's at " + path
        if not self._may_replace:
            raise CheckpointError(
                f"{difference}, which every other adapter of this base would have too; merge it instead"
            )
        if self._others:
            raise CheckpointError(
                f"{difference}, and replacing them would change adapters {self._others}; load this directory first, or "
                "onto a model of its own"
            )
        if type(parameter) is not nn.Parameter or is_sharded(parameter):
            raise CheckpointError(
                f"{difference}, and quantised or sharded ones cannot be replaced; load the adapter before that is done"
            )
        if UNMERGED_STATE in vars(layer):
            raise CheckpointError(f"{difference}, and an adapter is merged into that layer; call unmerge_adapter first")
        earlier = self._new.get(id(parameter))
        if earlier is not None and not torch.equal(earlier, saved.to(parameter)):
            raise CheckpointError(
                f"{difference}; the model has one weight for input and output embeddings, and the directory two that "
                "differ"
            )
        self._new[id(parameter)] = nn.Parameter(saved.to(parameter), requires_grad=False)

    def replace(self, adapters: AdapterSet) -> None:
        """Replace the embeddings at all their paths; `AdapterSet.restore_rows` restores the old ones."""
        if not self._new:
            return
        for path, module in self._places.modules.items():
            layer = unwrapped(module)
            for name, parameter in layer._parameters.items():
                if parameter is not None and id(parameter) in self._new:
                    adapters.replaced_rows.setdefault(f"{path}.{name}", ReplacedRows(layer, name, parameter))
                    layer._parameters[name] = self._new[id(parameter)]
        adapters.selection.forget()


def _other_shape(path: str, saved: Tensor, own: Tensor) -> str:
    if saved.dim() == own.dim() == 2 and saved.shape[1] == own.shape[1]:
        return (
            f"it holds {len(saved)} rows for {path}, and the model has {len(own)}, because the vocabulary was resized; "
            f"call model.resize_token_embeddings({len(saved)}) before loading"
        )
    return f"made for another base model: {path} is {list(saved.shape)} there, here {list(own.shape)}"
