"""State dict of one adapter under PEFT's keys: `base_model.model.` + the module's path + the parameter."""

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from peftcore.adapter import Adapter
from peftcore.bases import ParameterWeight
from peftcore.files.tensors import PREFIX
from peftcore.injection.adapter_set import AdapterSet, shared_by
from peftcore.layers.trained_bias import TrainedBias
from peftcore.prompts.learner import PromptLearner

SHARED_PREFIX = "base_model."


class _Entry(NamedTuple):
    """The adapter, or trained bias, of one layer."""

    prefix: str
    """First part of its keys."""
    adapter: Adapter
    tensors: dict[str, Tensor]
    """{key without the prefix: tensor}"""


class AdapterState:
    """Modules and tensors of one adapter, by PEFT's keys.

    Args:
        adapters: {path: adapter of that layer}.
        biases: {path: trained bias of the base}.
        copies: {path: module that trains in full} (`modules_to_save`).
        prompt: The prompt of a prompt method; None for methods that adapt layers.
    """

    def __init__(
        self,
        adapters: Mapping[str, Adapter],
        biases: Mapping[str, TrainedBias],
        copies: Mapping[str, nn.Module],
        prompt: PromptLearner | None,
    ):
        self.entries = [_Entry(_prefix(path, a), a, a.checkpoint_tensors()) for path, a in adapters.items()]
        bias_entries = [
            _Entry(_bias_prefix(path, bias, adapters), bias, bias.checkpoint_tensors()) for path, bias in biases.items()
        ]
        self.entries += bias_entries
        self.bias_keys = [f"{entry.prefix}bias" for entry in bias_entries]
        self.shared = shared_by(adapters)
        # PEFT wraps the model in one more module for adapters of layers than for prompts
        self.path_prefix = PREFIX if prompt is None or prompt.adapts_blocks else SHARED_PREFIX
        """First part of every key, before the path of a module."""
        self._adapters, self._copied = adapters, copies.keys()
        self.copies = {f"{self.path_prefix}{path}.": module for path, module in copies.items()}
        self.prompt = prompt

    def paths(self) -> set[str]:
        """Return the paths of the modules that PEFT wraps for this adapter."""
        return {*self._adapters, *self._copied}

    def base_prefix(self, path: str) -> str:
        """Return the first part of the keys of the base's own parameters at a module path."""
        adapter = self._adapters.get(path)
        return f"{self.path_prefix}{path}." if adapter is None else f"{_prefix(path, adapter)}base_layer."

    def tensors(self) -> dict[str, Tensor]:
        """Return {PEFT's key: tensor}."""
        tensors = {f"{prefix}{key}": tensor for prefix, _, own in self.entries for key, tensor in own.items()}
        if self.shared is not None:
            tensors |= {f"{SHARED_PREFIX}{name}": tensor for name, tensor in self.shared.checkpoint_tensors().items()}
        for prefix, module in self.copies.items():
            tensors |= {f"{prefix}{key}": tensor for key, tensor in module.state_dict().items()}
        return tensors if self.prompt is None else tensors | self.prompt.checkpoint_tensors()

    def repetitions(self) -> dict[str, Tensor]:
        """Return {PEFT's key: copy of a tensor} of what PEFT saves a second time and asks for when it loads."""
        repeated = ((prefix, adapter.repeated_tensors()) for prefix, adapter, _ in self.entries)
        return {f"{prefix}{key}": tensor.clone() for prefix, tensors in repeated for key, tensor in tensors.items()}

    def optional(self) -> set[str]:
        """Return the keys that a directory may omit."""
        return set() if self.shared is None else {f"{SHARED_PREFIX}{name}" for name in self.shared.optional}

    def repeated(self) -> set[str]:
        """Return the keys that a directory may hold and that are not read, because they repeat other tensors."""
        repeated = {f"{prefix}{key}" for prefix, adapter, _ in self.entries for key in adapter.repeated_keys()}
        # PEFT saves a trained embedding twice if it also saves the base's embeddings, and with bias="all" it saves the
        # biases of `modules_to_save` twice more
        for prefix, module in self.copies.items():
            keys = module.state_dict().keys()
            repeated |= {f"{prefix}modules_to_save.{key}" for key in keys}
            if self.bias_keys:
                repeated |= {f"{prefix}original_module.{key}" for key in keys if key.endswith("bias")}
        return repeated

    def former(self, keys: Iterable[str]) -> str | None:
        """Return what to do about keys that older versions of HF PEFT wrote, with another meaning; None for others."""
        former = {
            name: advice for adapter in self._adapters.values() for name, advice in adapter.former_tensors.items()
        }
        return next((former[tail] for key in keys if (tail := key.rpartition(".")[2]) in former), None)

    def with_our_keys(
        self, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor] | None = None, name: str = "default"
    ) -> Mapping[str, Tensor]:
        """Return a directory's tensors with our keys, without the other spellings that occur in published adapters.

        A trained bias is `bias` or `base_layer.bias`. State dicts that were saved by hand have further parts:
        `_orig_mod` of a compiled model, `module` of DistributedDataParallel, and the adapter's name.

        Args:
            tensors: The tensors by key.
            expected: The value of `tensors()`, if the caller has it.
            name: The adapter's name.
        """
        expected = self.tensors() if expected is None else expected
        foreign = tensors.keys() - expected.keys()
        if not foreign:
            return tensors
        our_key = {_other_spelling(key): key for key in self.bias_keys}
        renamed: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            if key in foreign and our_key.get(key, key) not in tensors:
                key = our_key[key]
            elif key in foreign:
                key = next((k for k in _plain_spellings(key, name) if k in expected and k not in tensors), key)
            renamed[key] = tensor
        return renamed

    def parameter_name(self, key: str, name: str) -> str:
        """Return the name that a tensor's parameter has in HF PEFT's model: with the adapter's name in it.

        Args:
            key: PEFT's key of a tensor on disk.
            name: The adapter's name.
        """
        for prefix, module in self.copies.items():
            if key.startswith(prefix) and key.removeprefix(prefix) in module.state_dict():
                return f"{prefix}modules_to_save.{name}.{key.removeprefix(prefix)}"
        if self.prompt is not None:
            return f"prompt_encoder.{name}.{key}"
        if key in self.bias_keys:
            return key
        prefix = next((prefix for prefix, _, own in self.entries if key.removeprefix(prefix) in own), SHARED_PREFIX)
        first, dot, rest = key.removeprefix(prefix).partition(".")
        return f"{prefix}{first}.{name}{dot}{rest}"

    def fits(self, key: str, tensor: Tensor) -> bool:
        """Return True if the adapter can read this tensor although its shape differs from the present parameter's."""
        owner = self._owners.get(key)
        return owner is not None and owner[0].fits(owner[1], tensor)

    @cached_property
    def _owners(self) -> dict[str, tuple[Adapter, str]]:
        return {f"{prefix}{key}": (adapter, key) for prefix, adapter, own in self.entries for key in own}

    @torch.no_grad()
    def read(self, tensors: Mapping[str, Tensor]) -> None:
        """Read checked tensors, except the prompt's. Adapters without values may keep the tensors instead of copies."""
        shared = {} if self.shared is None else self.shared.checkpoint_tensors()
        if any(tensor.is_meta for own in (shared, *(own for _, _, own in self.entries)) for tensor in own.values()):
            self._make_memory()
        for prefix, adapter, own in self.entries:
            adapter.load_checkpoint_tensors({key: tensors[f"{prefix}{key}"] for key in own})
            vars(adapter).pop("is_unread", None)
            adapter.mark_changed()  # caches do not check tensor versions in threads without edit tracking
        if self.shared is not None:
            names = {name: f"{SHARED_PREFIX}{name}" for name in shared}
            self.shared.load_checkpoint_tensors({n: tensors[key] for n, key in names.items() if key in tensors})
        for prefix, module in self.copies.items():
            module.load_state_dict({key: tensors[f"{prefix}{key}"] for key in module.state_dict()})

    def _make_memory(self) -> None:
        """Give memory to parameters on the meta device; layers that share a parameter still do."""
        allocated: dict[int, nn.Parameter] = {}
        for _, adapter, _ in self.entries:
            for module in adapter.modules():
                for name, parameter in module._parameters.items():
                    if parameter is not None and parameter.is_meta:
                        empty = torch.empty_like(parameter, device=adapter.base.device)
                        new = allocated.setdefault(id(parameter), nn.Parameter(empty, parameter.requires_grad))
                        module._parameters[name] = new


def adapter_state_of(adapters: AdapterSet, name: str) -> AdapterState:
    """Return the state of an adapter that is in the model."""
    return AdapterState(adapters.adapters(name), adapters.biases(name), adapters.copies(name), adapters.prompt(name))


def _prefix(path: str, adapter: Adapter) -> str:
    """Return the first part of an adapter's keys; for a raw parameter, with the path of its module."""
    if isinstance(base := adapter.base, ParameterWeight):
        path = path.removesuffix(f".{base.name}")
        path = f"{path}.base_layer.{base.owner_path}" if base.owner_path else path
    return f"{PREFIX}{path}.{adapter.disk_prefix}"


def _bias_prefix(path: str, bias: TrainedBias, adapters: Mapping[str, Adapter]) -> str:
    """Return the first part of a trained bias's key: PEFT wraps a layer once, or once per raw parameter of it."""
    layer = path.removesuffix(".bias")
    raw = (f"{layer}.{a.base.name}" for a in adapters.values() if isinstance(a.base, ParameterWeight))
    wrappers = 1 if path in adapters else sum(parameter in adapters for parameter in raw)
    return _prefix(path, bias) + "base_layer." * wrappers


def _plain_spellings(key: str, name: str) -> list[str]:
    """Return the candidates for PEFT's key of a foreign key, the likeliest first.

    State dicts that were saved by hand have additional parts in their keys, such as `module` or the adapter's name.
    """
    parts = [part for part in key.removeprefix("module.").split(".") if part != "_orig_mod"]
    if parts[:2] == ["base_model", "model"] and "base_model" in parts[2:]:
        parts = parts[parts.index("base_model", 2) :]
    if parts[0] != "base_model":
        parts = ["base_model", "model", *parts]
    spellings = [parts]
    for written in (name, "default"):
        places = [place for place, part in enumerate(parts) if part == written]
        spellings += [parts[:place] + parts[place + 1 :] for place in reversed(places)]
    spellings += [[part for part in spelling if part != "modules_to_save"] for spelling in spellings]
    return [".".join(spelling) for spelling in spellings]


def _other_spelling(key: str) -> str:
    layer = key.removesuffix(".bias")
    return f"{layer.removesuffix('.base_layer')}.bias" if layer.endswith(".base_layer") else f"{layer}.base_layer.bias"
