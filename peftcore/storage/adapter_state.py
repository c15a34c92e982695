"""What one adapter is made of, under PEFT's keys: `base_model.model.` + the module's path + the parameter."""

from collections.abc import Mapping
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from peftcore._util.tensors import PREFIX
from peftcore.adapter import Adapter
from peftcore.bases import ParameterWeight
from peftcore.injection.adapter_set import AdapterSet, shared_by
from peftcore.layers.trained_bias import TrainedBias
from peftcore.prompts.learner import PromptLearner

SHARED_PREFIX = "base_model."


class _Entry(NamedTuple):
    """The adapter of one layer."""

    prefix: str
    """What stands before its keys."""
    adapter: Adapter
    tensors: dict[str, Tensor]
    """{key without the prefix: tensor}"""


class Content:
    """What one adapter is made of, asked for its tensors once."""

    def __init__(
        self,
        adapters: Mapping[str, Adapter],
        biases: Mapping[str, TrainedBias],
        copies: Mapping[str, nn.Module],
        prompt: PromptLearner | None,
    ):
        self.entries = [_Entry(_prefix(path, a), a, a.checkpoint_tensors()) for path, a in adapters.items()]
        of_biases = [
            _Entry(_bias_prefix(path, bias, adapters), bias, bias.checkpoint_tensors()) for path, bias in biases.items()
        ]
        self.entries += of_biases
        self.bias_keys = [f"{entry.prefix}bias" for entry in of_biases]
        self.shared = shared_by(adapters)
        # PEFT wraps a model once more for adapters of layers than for prompts
        self.path_prefix = PREFIX if prompt is None else SHARED_PREFIX
        """What stands before the path of a module."""
        self._adapters, self._copied = adapters, copies.keys()
        self.copies = {f"{self.path_prefix}{path}.": module for path, module in copies.items()}
        self.prompt = prompt

    def paths(self) -> set[str]:
        """Paths of the modules that PEFT wraps for this adapter."""
        return {*self._adapters, *self._copied}

    def base_prefix(self, path: str) -> str:
        """What stands before the keys of the base's own parameters at a module path."""
        adapter = self._adapters.get(path)
        return f"{self.path_prefix}{path}." if adapter is None else f"{_prefix(path, adapter)}base_layer."

    def tensors(self) -> dict[str, Tensor]:
        """{PEFT's key: tensor}"""
        keyed = {f"{prefix}{key}": tensor for prefix, _, own in self.entries for key, tensor in own.items()}
        if self.shared is not None:
            keyed |= {f"{SHARED_PREFIX}{name}": tensor for name, tensor in self.shared.checkpoint_tensors().items()}
        for prefix, module in self.copies.items():
            keyed |= {f"{prefix}{key}": tensor for key, tensor in module.state_dict().items()}
        return keyed if self.prompt is None else keyed | self.prompt.checkpoint_tensors()

    def optional(self) -> set[str]:
        """Keys that a directory may lack."""
        return set() if self.shared is None else {f"{SHARED_PREFIX}{name}" for name in self.shared.optional}

    def repeated(self) -> set[str]:
        """Keys that a directory may hold and that are not read."""
        repeated = {f"{prefix}{key}" for prefix, adapter, _ in self.entries for key in adapter.repeated_keys()}
        # PEFT writes a copy of an embedding twice where it also saves the base's embeddings, and with bias="all" the
        # biases of a module that trains whole twice more
        for prefix, module in self.copies.items():
            own = module.state_dict().keys()
            repeated |= {f"{prefix}modules_to_save.{key}" for key in own}
            if self.bias_keys:
                repeated |= {f"{prefix}original_module.{key}" for key in own if key.endswith("bias")}
        return repeated

    def spelled(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A directory's tensors, each bias under our key: it may stand beside its layer, or as `base_layer`'s."""
        ours = {_other_spelling(key): key for key in self.bias_keys}
        if not any(key in ours for key in tensors):
            return tensors
        return {key if ours.get(key, key) in tensors else ours[key]: tensor for key, tensor in tensors.items()}

    def fits(self, key: str, tensor: Tensor) -> bool:
        """Whether a tensor of another shape than now can be read all the same."""
        owner = self._owners.get(key)
        return owner is not None and owner[0].fits(owner[1], tensor)

    @cached_property
    def _owners(self) -> dict[str, tuple[Adapter, str]]:
        return {f"{prefix}{key}": (adapter, key) for prefix, adapter, own in self.entries for key in own}

    @torch.no_grad()
    def read(self, tensors: Mapping[str, Tensor]) -> None:
        """Take checked tensors in, all but the prompt's; adapters that hold nothing yet may keep them."""
        for prefix, adapter, own in self.entries:
            adapter.load_checkpoint_tensors({key: tensors[f"{prefix}{key}"] for key in own})
            vars(adapter).pop("is_unread", None)
            adapter.mark_changed()  # the versions of its tensors are not looked at in a thread that is told of no edits
        if self.shared is not None:
            names = {name: f"{SHARED_PREFIX}{name}" for name in self.shared.checkpoint_tensors()}
            self.shared.load_checkpoint_tensors({n: tensors[key] for n, key in names.items() if key in tensors})
        for prefix, module in self.copies.items():
            module.load_state_dict({key: tensors[f"{prefix}{key}"] for key in module.state_dict()})


def content_of(adapters: AdapterSet, name: str) -> Content:
    """Of an adapter that is in the model."""
    return Content(adapters.adapters(name), adapters.biases(name), adapters.copies(name), adapters.prompt(name))


def _prefix(path: str, adapter: Adapter) -> str:
    """What stands before an adapter's own keys; a raw parameter's adapter is kept under the module it belongs to."""
    if isinstance(base := adapter.base, ParameterWeight):
        path = path.removesuffix(f".{base.name}")
        path = f"{path}.base_layer.{base.owner_path}" if base.owner_path else path
    return f"{PREFIX}{path}.{adapter.disk_prefix}"


def _bias_prefix(path: str, bias: TrainedBias, adapters: Mapping[str, Adapter]) -> str:
    """What stands before a trained bias's key: PEFT keeps a layer that it adapts as `base_layer`."""
    return _prefix(path, bias) + ("base_layer." if path in adapters else "")


def _other_spelling(key: str) -> str:
    layer = key.removesuffix(".bias")
    return f"{layer.removesuffix('.base_layer')}.bias" if layer.endswith(".base_layer") else f"{layer}.base_layer.bias"
