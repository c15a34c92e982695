"""The only hosts: `AdaptedLayer` around a base layer, `SavedModule` around a module trained whole.

With adapters 1..n acting in order, the layer computes f_n where f_0 is the base and
f_k(x) = after_k(x, f_{k-1}(before_k(x))), which is what merging them one after another into W gives.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.adapter import Adapter
from peftcore.bases import BaseWeight, base_weight
from peftcore.bases.parameter import ParameterWeight
from peftcore.fast_path import Waiting, fused, only_computes

_OWN_STATE = "_own_state"
"""Attribute of a base layer whose weight an adapter's start has replaced: what was there before."""


class Selection:
    """Which adapters act; one object shared by every host of a model, so that switching is one assignment."""

    def __init__(self) -> None:
        self.active: tuple[str, ...] = ()
        self.disabled = False
        self.waiting: dict[Any, Waiting] = {}
        """What hosts have computed for others that read the same input, until those are called."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "waiting": {}}

    @property
    def acting(self) -> tuple[str, ...]:
        """Names in the order in which they act; () while disabled."""
        return () if self.disabled else self.active

    def acts(self, name: str) -> bool:
        """Whether the adapter of this name acts."""
        return name in self.acting


class NamedModules(nn.Module):
    """Modules by any name. (`nn.ModuleDict` refuses names like "keys" or "type" that are its attributes.)"""

    def __contains__(self, name: str) -> bool:
        return name in self._modules

    def __getitem__(self, name: str) -> Any:
        return self._modules[name]

    def get(self, name: str) -> Any:
        """The module, or None."""
        return self._modules.get(name)

    def __setitem__(self, name: str, module: nn.Module) -> None:
        self._modules[name] = module

    def __delitem__(self, name: str) -> None:
        del self._modules[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)


class Prompts(NamedModules):
    """A model's prompt learners by adapter name: a submodule of the model, but no part of the base."""

    is_no_part_of_the_base = True


class _Host(nn.Module):
    """A module that stands in for `base_layer` and lets the model's code read its attributes."""

    base_layer: nn.Module

    def __init__(self, base_layer: nn.Module, selection: Selection):
        super().__init__()
        self.base_layer = base_layer
        self.selection = selection
        self.train(base_layer.training)

    def _stands_for(self) -> nn.Module:
        return self.base_layer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "base_layer" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self._stands_for(), name)


class Site:
    """Where adapters sit: those of one base weight by name, and what of them is merged into it."""

    adapters: NamedModules
    merged: tuple[str, ...]
    selection: Selection
    training: bool

    @property
    def base(self) -> BaseWeight:
        """The view on the base weight."""
        raise NotImplementedError

    @property
    def unmerged_state(self) -> dict[str, Any] | None:
        """The base's own parameters while adapters are merged (one more copy of the weight in memory)."""
        base = self.base
        return base.layer.__dict__.get(base.unmerged_attribute)

    @unmerged_state.setter
    def unmerged_state(self, state: dict[str, Any] | None) -> None:
        base = self.base
        if state is None:
            base.layer.__dict__.pop(base.unmerged_attribute, None)
        else:
            base.layer.__dict__[base.unmerged_attribute] = state

    def replace_base(self, weight: Tensor) -> None:
        """Give the base another weight; `restore_base` gives its own back, to the bit."""
        base = self.base
        base.layer.__dict__.setdefault(_OWN_STATE, base.state())
        base.write(weight)

    @property
    def has_replaced_base(self) -> bool:
        """Whether the base stands now with a weight that `replace_base` gave it."""
        return _OWN_STATE in self.base.layer.__dict__

    def restore_base(self) -> None:
        """Undo `replace_base`."""
        base = self.base
        own = base.layer.__dict__.pop(_OWN_STATE, None)
        if own is not None:
            base.restore(own)

    def acting(self) -> list[Adapter]:
        """Adapters of this site that act and are not merged, in order."""
        adapters = self._modules["adapters"]._modules  # type: ignore[attr-defined]
        return [adapters[n] for n in self.selection.acting if n in adapters and n not in self.merged]  # type: ignore[misc]


class AdaptedLayer(_Host, Site):
    """A base layer and its adapters."""

    def __init__(self, base_layer: nn.Module, selection: Selection):
        super().__init__(base_layer, selection)
        self.adapters = NamedModules()
        self.merged = ()
        self._view: BaseWeight | None = None
        self.sharing: list[AdaptedLayer] = []
        """Hosts called later that may read the same input as this one."""

    def is_empty(self) -> bool:
        """Whether no adapter is left here."""
        return not len(self.adapters)

    @property
    def base(self) -> BaseWeight:
        view = self._view  # kept, because making one takes as long as a small layer
        if view is None or not view.still_fits(self._modules["base_layer"]):
            self._view = view = base_weight(self.base_layer)
        return view

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        acting = self.acting()
        within = len(acting)
        while within and not acting[within - 1].through_weight:
            within -= 1
        inputs: list[Tensor] = []
        for adapter in reversed(acting[within:]):
            inputs.append(x)
            x = adapter.before(x)
        if not within and not args and not kwargs and acting and (y := fused(self, acting[0], x)) is not None:
            within, _ = 1, inputs.pop()
        else:
            y = self._through_weight(x, acting[:within]) if within else self._base_output(x, *args, **kwargs)
        for adapter in acting[within:]:
            y = adapter.after(inputs.pop(), y)
        return y

    def _base_output(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = self.base
        if base.quantized and not args and not kwargs and base.prefers_product(x) and only_computes(self.base_layer):
            return base.product(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)
        return self.base_layer(x, *args, **kwargs)

    def _through_weight(self, x: Tensor, adapters: list[Adapter]) -> Tensor:
        base = self.base
        weight, bias = base.read(), base.bias
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        for adapter in adapters:
            adapter.check_mergeable()
            weight, bias = adapter.forward_weight(weight), adapter.merged_bias(bias)
        y = base.apply(x, weight)
        return y if bias is None else y + base.per_output(bias).to(y.dtype)


class AdaptedParameters(_Host):
    """A module some of whose raw parameters are adapted: they stand changed while its forward runs."""

    def __init__(self, base_layer: nn.Module, selection: Selection):
        super().__init__(base_layer, selection)
        self.sites = NamedModules()

    def is_empty(self) -> bool:
        """Whether no adapter is left here."""
        return not any(len(self.sites[name].adapters) for name in self.sites)

    def site(self, name: str) -> "ParameterSite":
        """The site of a parameter, made if need be."""
        key = name.replace(".", "/")  # a module's own name has no dots
        if key not in self.sites:
            self.sites[key] = ParameterSite(self.base_layer, name, self.selection).train(self.training)
        return self.sites[key]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        sites = (self.sites[key] for key in self.sites)
        changed = {site.base.name: site.changed() for site in sites if site.acting()}
        if not changed:
            return self.base_layer(*args, **kwargs)
        return torch.func.functional_call(self.base_layer, changed, args, kwargs)


class ParameterSite(nn.Module, Site):
    """One raw parameter of a module and its adapters."""

    def __init__(self, module: nn.Module, name: str, selection: Selection):
        super().__init__()
        self._base = ParameterWeight(module, name)
        self.selection = selection
        self.adapters = NamedModules()
        self.merged = ()

    @property
    def base(self) -> ParameterWeight:
        return self._base

    def changed(self) -> Tensor:
        """The parameter with the acting adapters in it, as the module keeps it."""
        weight = self.base.read()
        for adapter in self.acting():
            weight = adapter.merged_weight(weight)
        return self.base.oriented(weight)


class SavedModule(_Host):
    """`modules_to_save`: one whole trainable copy per adapter; the original where no active adapter has one."""

    def __init__(self, base_layer: nn.Module, selection: Selection):
        super().__init__(base_layer, selection)
        self.copies = NamedModules()

    def current(self) -> nn.Module:
        """The module that acts now: the first active adapter's copy, or the original."""
        names = [name for name in self.selection.acting if name in self.copies]
        return self.copies[names[0]] if names else self.base_layer

    def _stands_for(self) -> nn.Module:
        return self.current()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.current()(*args, **kwargs)


def unhosted(module: nn.Module) -> nn.Module:
    """The module that a host stands for; any other module itself."""
    return module.base_layer if isinstance(module, _Host) else module


def modules_outside_hosts(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of a model as it was before injection: each host is given, nothing inside it.

    A module that stands at several paths is given once for each.
    """
    for name, child in model._modules.items():
        if child is None or isinstance(child, Prompts):
            continue
        path = f"{prefix}{name}"
        yield path, child
        if not isinstance(child, _Host):
            yield from modules_outside_hosts(child, f"{path}.")
