"""The only hosts: `AdaptedLayer` around a base layer, `SavedModule` around a module trained whole.

With adapters 1..n acting in order, the layer computes f_n where f_0 is the base and
f_k(x) = after_k(x, f_{k-1}(before_k(x))), which is what merging them one after another into W gives.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.adapter import Adapter
from peftcore.bases import BaseWeight, base_weight
from peftcore.bases.own_tensors import call_with
from peftcore.bases.parameter import ParameterWeight
from peftcore.composition.algebra import Composition
from peftcore.composition.evaluation import composed, composed_weight
from peftcore.composition.route import Route
from peftcore.errors import RoutingError
from peftcore.fast_path import fused, is_traced, only_computes, stacked
from peftcore.neighbours import given
from peftcore.selection import Selection

_OWN_STATE = "_own_state"
"""Attribute of a base layer whose weight an adapter's start has replaced: what was there before."""


class NamedModules(nn.Module):
    """Modules by any name. (`nn.ModuleDict` refuses names like "keys" or "type" that are its attributes.)"""

    changes = 0
    """How often one was put in or taken out (count)."""

    def __contains__(self, name: str) -> bool:
        return name in self._modules

    def __getitem__(self, name: str) -> Any:
        return self._modules[name]

    def get(self, name: str) -> Any:
        """The module, or None."""
        return self._modules.get(name)

    def __setitem__(self, name: str, module: nn.Module) -> None:
        self._modules[name] = module
        self.__dict__["changes"] = self.changes + 1  # not by nn.Module's own assignment, which is slow

    def __delitem__(self, name: str) -> None:
        del self._modules[name]
        self.__dict__["changes"] = self.changes + 1

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
        self.path = ""
        """Where it stands in the model: at the first place, if at several."""
        self.train(base_layer.training)

    def _stands_for(self) -> nn.Module:
        return self.base_layer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            protocol = name.startswith(
                "__"
            )  # such as a parametrised layer's own __deepcopy__: the host is copied whole
            if protocol or "base_layer" not in self.__dict__.get("_modules", {}):
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

    def at_work(self) -> dict[str, Adapter]:
        """{name: adapter} of those at this site that are not merged."""
        adapters = self._modules["adapters"]._modules  # type: ignore[attr-defined]
        return {name: a for name, a in adapters.items() if name not in self.merged} if self.merged else adapters

    def acting(self) -> list[Adapter]:
        """Adapters of this site that act and are not merged, in order."""
        adapters = self.at_work()
        return [adapters[n] for n in self.selection.acting if n in adapters]


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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.selection.forget()  # `to` and the like move weights behind autograd's back
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.selection.forget()
        super()._load_from_state_dict(*args, **kwargs)

    def take_view(self, view: BaseWeight) -> None:
        """Have a view on the base that was made already, where there is none yet."""
        self._view = self._view or view

    @property
    def base(self) -> BaseWeight:
        view = self._view  # kept, because making one takes as long as a small layer
        if view is None or not view.still_fits(self._modules["base_layer"]):
            self._view = view = base_weight(self.base_layer)
        return view

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not args and not kwargs and not torch.compiler.is_compiling() and (y := given(self, x)) is not None:
            return y
        route = self.selection.route
        if route is None or route.chain is not None:
            return self.chain_output(self.acting(), x, *args, **kwargs)
        at_work = self.at_work()
        if not any(name in at_work for name in route.names):
            return self.base_output(x, *args, **kwargs)
        if not args and not kwargs and (y := stacked(self, x, route)) is not None:
            return y
        return composed(self, route, x, *args, **kwargs)

    def chain_output(self, adapters: Sequence[Adapter], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the base with adapters one on top of another gives."""
        within = len(adapters)
        while within and not adapters[within - 1].through_weight:
            within -= 1
        plain = not within and not args and not kwargs and bool(adapters)
        if plain and (y := stacked(self, x)) is not None:
            return y
        inputs: list[Tensor] = []
        for adapter in reversed(adapters[within:]):
            inputs.append(x)
            x = adapter.before(x)
        if plain and (y := fused(self, adapters[0], x)) is not None:
            within, _ = 1, inputs.pop()
        else:
            y = self._through_weight(x, adapters[:within]) if within else self.base_output(x, *args, **kwargs)
        for adapter in adapters[within:]:
            y = adapter.after(inputs.pop(), y)
        return y

    def base_output(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the base layer gives."""
        base = self.base
        computes = base.quantized and not is_traced() and only_computes(self.base_layer)
        if computes and not args and not kwargs and base.prefers_product(x):
            y = base.product(x.reshape(-1, x.shape[-1]))
            return y.view(*x.shape[:-1], y.shape[-1])
        return self.base_layer(x, *args, **kwargs)

    def _through_weight(self, x: Tensor, adapters: Sequence[Adapter]) -> Tensor:
        base = self.base
        weight, bias = base.read(), base.bias
        own = weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        for adapter in adapters:
            adapter.check_mergeable()
            weight, bias = adapter.forward_weight(weight), adapter.merged_bias(bias)
        if x.dtype.itemsize > 2 or base.kind == "norm":
            y = base.apply(x, weight)
        else:  # W' rounded to 16 bits would lose changes below their precision, and W' − W does not
            y = base.apply(x, own) + base.apply(x, weight - own)
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
            self.sites[key].path = f"{self.path}.{name}"
        return self.sites[key]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        sites = (self.sites[key] for key in self.sites)
        changed = {site.base.name: site.changed() for site in sites if site.acting()}
        if not changed:
            return self.base_layer(*args, **kwargs)
        return call_with(self.base_layer, changed, args, kwargs)


class ParameterSite(nn.Module, Site):
    """One raw parameter of a module and its adapters."""

    def __init__(self, module: nn.Module, name: str, selection: Selection):
        super().__init__()
        self._base = ParameterWeight(module, name)
        self.path = name
        self.selection = selection
        self.adapters = NamedModules()
        self.merged = ()

    @property
    def base(self) -> ParameterWeight:
        return self._base

    def changed(self) -> Tensor:
        """The parameter with the acting adapters in it, as the module keeps it."""
        weight, route = self.base.read(), self.selection.route
        if route is None or route.chain is not None:
            for adapter in self.acting():
                weight = adapter.merged_weight(weight)
        elif route.uniform is None:
            raise RoutingError(
                f"{self.path} is one weight for all rows of a batch, and they are to have different adapters there; "
                "route one adapter for the whole batch, or leave it out of target_parameters"
            )
        else:
            weight = composed_weight(route.uniform, weight, self.at_work(), self.path)
        return self.base.oriented(weight)


class SavedModule(_Host):
    """`modules_to_save`: one whole trainable copy per adapter; the original where no active adapter has one."""

    def __init__(self, base_layer: nn.Module, selection: Selection):
        super().__init__(base_layer, selection)
        self.copies = NamedModules()

    def current(self, one: Composition | None = None) -> nn.Module:
        """The module that acts now, or in a composition: the first adapter's copy, or the original."""
        chain = self.selection.acting if one is None else one.chain()
        names = [name for name in (tuple(one.names()) if one and chain is None else chain or ()) if name in self.copies]
        if one is not None and chain is None and len(set(names)) > 1:
            raise RoutingError(
                f"{self.path} was trained whole by {sorted(set(names))}, and whole modules cannot be mixed; compose "
                "adapters of which one at most has modules_to_save"
            )
        return self.copies[names[0]] if names else self.base_layer

    def _stands_for(self) -> nn.Module:
        route = self.selection.route
        return self.current() if route is None or route.uniform is None else self.current(route.uniform)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        route = self.selection.route
        if route is None or route.uniform is not None:
            return self._stands_for()(*args, **kwargs)
        copies = {self.current(one) for one in route.compositions}
        return copies.pop()(*args, **kwargs) if len(copies) == 1 else self._by_rows(route, *args, **kwargs)

    def _by_rows(self, route: Route, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs or len(args) != 1 or not isinstance(args[0], Tensor):
            raise RoutingError(f"{self.path} was trained whole and takes more than one tensor, so rows cannot be told")
        groups = route.groups(args[0], self.path)
        outputs = [self.current(one)(args[0].index_select(0, rows)) for one, rows in groups]
        if not all(isinstance(y, Tensor) for y in outputs):
            raise RoutingError(
                f"{self.path} was trained whole and gives more than a tensor, so rows cannot be put back"
            )
        return torch.cat(outputs).index_select(0, torch.cat([rows for _, rows in groups]).argsort())


def unhosted(module: nn.Module) -> nn.Module:
    """The module that a host stands for; any other module itself."""
    return module.base_layer if isinstance(module, _Host) else module


def modules_outside_hosts(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of a model as it was before injection: each host is given, and nothing inside it but what stands
    inside of a module whose raw parameters are adapted.

    A module that stands at several paths is given once for each.
    """
    for name, child in model._modules.items():
        if child is None or isinstance(child, Prompts):
            continue
        path = f"{prefix}{name}"
        yield path, child
        if not isinstance(child, _Host):
            yield from modules_outside_hosts(child, f"{path}.")
        elif isinstance(child, AdaptedParameters):
            yield from modules_outside_hosts(child.base_layer, f"{path}.")
