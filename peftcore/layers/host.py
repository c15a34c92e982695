"""The only hosts: `AdaptedLayer` around a base layer, `SavedModule` around a module trained whole.

With adapters 1..n acting in order, the layer computes f_n where f_0 is the base and
f_k(x) = after_k(x, f_{k-1}(before_k(x))), which is what merging them one after another into W gives.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.adapter import Adapter
from peftcore.bases import BaseWeight, base_weight
from peftcore.bases.base import OWN_STATE
from peftcore.bases.own_tensors import call_with
from peftcore.bases.parameter import ParameterWeight
from peftcore.composition.algebra import Composition
from peftcore.composition.evaluation import composed, composed_weight
from peftcore.composition.route import Route
from peftcore.errors import MergeError, RoutingError
from peftcore.layers.active import Selection
from peftcore.layers.fast_path import fused, is_traced, only_computes, stacked
from peftcore.layers.shared_inputs import given
from peftcore.layers.trained_bias import TrainedBias


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

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, nn.Module):  # as `set_submodule` replaces one
            self.__dict__["changes"] = self.changes + 1

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
    rows_first: bool | None = (
        None  # not `batch_first`: models read that one of nn.MultiheadAttention, through this host
    )
    """Whether its rows come before their tokens; None: not known yet, see `peftcore.detection.batch_axis`."""

    def __init__(self, base_layer: nn.Module, selection: Selection):
        super().__init__()
        self.base_layer = base_layer
        self.selection = selection
        self.path = ""
        """Where it stands in the model: at the first place, if at several."""
        self.train(base_layer.training)

    def sees_tokens(self, x: Tensor) -> bool:
        """Whether an input of this shape has an axis of tokens besides that of rows."""
        return x.dim() == 3 or (x.dim() == 2 and not x.is_floating_point())

    def _stands_for(self) -> nn.Module:
        return self.base_layer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            protocol = name.startswith("__")  # a parametrised layer has its own __deepcopy__; a host is copied whole
            if protocol or "base_layer" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self._stands_for(), name)


def with_trained_biases(adapters: Iterable[Adapter]) -> list[Adapter]:
    """The adapters, and after each one the bias that trains with it, if any."""
    return [part for adapter in adapters for part in (adapter, adapter.trained_bias) if part is not None]


class Site:
    """Where adapters sit: those of one base weight by name, and what of them is merged into it."""

    adapters: NamedModules
    merged: tuple[str, ...]
    selection: Selection
    training: bool
    path: str
    merged_state: dict[str, Any] | None = None
    """The base's merged parameters while `disable_adapter` has its own in their place."""
    replaced_by: tuple[str, ...] = ()
    """Adapters whose start brought the weight that the base stands with now (LoftQ)."""
    has_trained_biases = False
    """Whether the base's bias trains, or has trained, with an adapter of this site."""

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

    def replace_base(self, weight: Tensor, name: str) -> None:
        """Give the base the weight that an adapter brings; `restore_base` gives its own back, to the bit."""
        base = self.base
        if not self.has_replaced_base:
            base.layer.__dict__[OWN_STATE] = base.state()
            base.write(weight)
        self.replaced_by = (*self.replaced_by, name)

    @property
    def has_replaced_base(self) -> bool:
        """Whether the base stands now with a weight that `replace_base` gave it."""
        return OWN_STATE in self.base.layer.__dict__

    def restore_base(self, *names: str) -> None:
        """Undo `replace_base` for these adapters; the base has its own weight again when none is left."""
        base = self.base
        before, self.replaced_by = self.replaced_by, tuple(name for name in self.replaced_by if name not in names)
        if before and not self.replaced_by:
            base.restore(base.layer.__dict__.pop(OWN_STATE))

    def keep_base(self) -> None:
        """Leave the base as it stands now, for good."""
        self.replaced_by = ()
        self.base.layer.__dict__.pop(OWN_STATE, None)

    def apply_to_set_aside(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Do to the parameters that stand aside what `nn.Module._apply` has done to those in their place."""
        base = self.base
        attributes = base.layer.__dict__
        states = [attributes[name] for name in (base.unmerged_attribute, OWN_STATE) if name in attributes]
        if self.merged_state is not None:
            states.append(self.merged_state)
        if not states:
            return
        in_place = {id(tensor) for tensor in base.layer.parameters()}
        aside = {id(t): t for state in states for t in _parameters(state) if id(t) not in in_place}
        holder = nn.Module()
        holder._parameters.update({str(key): parameter for key, parameter in aside.items()})
        holder._apply(fn)
        for state in states:
            _exchange(state, {key: holder._parameters[str(key)] for key in aside})
            base.follow(state)

    def adapter(self, name: str) -> Adapter:
        """The adapter of one name, on the base as it is now."""
        self.follow_base()
        return self.adapters[name]

    def follow_base(self) -> None:
        """Have the adapters on the base as it is now; somebody may have put another layer in its place."""
        _ = self.base

    def move_adapters(self, old: BaseWeight, new: BaseWeight) -> None:
        """Have the adapters on another view; MergeError where some are merged into a layer that is gone."""
        if self.merged and old.layer is not new.layer:
            raise MergeError(
                f"{self.path}: the base layer was replaced while {list(self.merged)} are merged into it; put the old "
                "layer back, call unmerge_adapter, and replace it then"
            )
        if old.layer is not new.layer:
            self.replaced_by = ()
        for name in self.adapters:
            for module in self.adapters[name].modules():
                if isinstance(module, Adapter) and module.base.layer is old.layer:
                    vars(module)["base"] = new
                    module.mark_changed()

    def at_work(self) -> dict[str, Adapter]:
        """{name: adapter} of those at this site that are not merged."""
        adapters = self._modules["adapters"]._modules  # type: ignore[attr-defined]
        return {name: a for name, a in adapters.items() if name not in self.merged} if self.merged else adapters

    def acting(self) -> list[Adapter]:
        """Adapters of this site that act and are not merged, in order."""
        return self.in_order(self.selection.acting)

    def in_order(self, names: Iterable[str]) -> list[Adapter]:
        """Those of `at_work` with these names, in this order, each one's trained bias after it."""
        at_work = self.at_work()
        adapters = [at_work[name] for name in names if name in at_work]
        return with_trained_biases(adapters) if self.has_trained_biases else adapters


def _parameters(state: Mapping[str, Any]) -> Iterator[nn.Parameter]:
    """Parameters among what a base has set aside, also inside of what it keeps together."""
    for value in state.values():
        if isinstance(value, Mapping):
            yield from _parameters(value)
        elif isinstance(value, nn.Parameter):
            yield value


def _exchange(state: dict[str, Any], new: Mapping[int, Any]) -> None:
    """Put other parameters in the place of those with these ids."""
    for name, value in state.items():
        if isinstance(value, dict):
            _exchange(value, new)
        else:
            state[name] = new.get(id(value), value)


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

    def sees_tokens(self, x: Tensor) -> bool:
        return super().sees_tokens(x) and self.base.kind != "conv"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.selection.forget()  # memory on the old device
        super()._apply(fn, recurse)
        if recurse:
            self.apply_to_set_aside(fn)
        return self

    def take_view(self, view: BaseWeight) -> None:
        """Have a view on the base that was made already, where there is none yet."""
        self._view = self._view or view

    def __getattr__(self, name: str) -> Any:
        # some models read a layer's bias and never call the layer
        return self._bias_now() if name == "bias" and self.has_trained_biases else super().__getattr__(name)

    def _bias_now(self) -> Tensor | None:
        """The base's bias as the acting adapters have trained it."""
        route, bias = self.selection.route, self.base.bias
        trained = [part for part in self.acting() if isinstance(part, TrainedBias)]
        if trained and route is not None and route.chain is None:
            raise RoutingError(f"{self.path}.bias is read for all rows of a batch at once; route one adapter for all")
        for part in trained:
            bias = part.merged_bias(bias)
        return bias

    @property
    def base(self) -> BaseWeight:
        view = self._view  # kept, because making one takes as long as a small layer
        if view is None or not view.still_fits(self._modules["base_layer"]):
            view = self._new_view(view)
        return view

    def _new_view(self, old: BaseWeight | None) -> BaseWeight:
        """A view on the base as it is now, for the adapters too."""
        view = base_weight(self.base_layer, self.path)
        if old is not None:
            self.move_adapters(old, view)
        self._view = view
        return view

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        now = self.selection.now
        if not args and not kwargs and not torch.compiler.is_compiling() and (y := given(self, x, now)) is not None:
            return y
        route = now if isinstance(now, Route) else None
        if route is None or route.chain is not None:
            return self.chain_output(self.acting(), x, *args, **kwargs)
        at_work = self.at_work()
        if not any(name in at_work for name in route.names):
            return self.base_output(x, *args, **kwargs)
        if not args and not kwargs and (y := stacked(self, x, route)) is not None:
            return y
        self.follow_base()
        return composed(self, route, x, *args, **kwargs)

    def chain_output(self, adapters: Sequence[Adapter], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the base with adapters one on top of another gives."""
        within = len(adapters)
        while within and not adapters[within - 1].through_weight:
            within -= 1
        plain = not within and not args and not kwargs and bool(adapters)
        if plain and (y := stacked(self, x)) is not None:
            return y
        self.follow_base()  # before an adapter looks at it
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

    def site(self, base: ParameterWeight) -> "ParameterSite":
        """The site of a parameter, made if need be."""
        key = base.name.replace(".", "/")  # a module's own name has no dots
        if key not in self.sites:
            self.sites[key] = ParameterSite(base, self).train(self.training)
        return self.sites[key]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        if recurse:
            for key in self.sites:
                self.sites[key].apply_to_set_aside(fn)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        sites = (self.sites[key] for key in self.sites)
        changed = {site.base.name: site.changed() for site in sites if site.acting()}
        if not changed:
            return self.base_layer(*args, **kwargs)
        return call_with(self.base_layer, changed, args, kwargs)


class ParameterSite(nn.Module, Site):
    """One raw parameter of a module and its adapters."""

    def __init__(self, base: ParameterWeight, owner: AdaptedParameters):
        super().__init__()
        self._base = base
        self._owner = (owner,)  # in a tuple, because it is no part of this module
        self.path = f"{owner.path}.{base.name}"
        self.selection = owner.selection
        self.adapters = NamedModules()
        self.merged = ()

    @property
    def base(self) -> ParameterWeight:
        module = self._owner[0].base_layer
        if not self._base.still_fits(module):
            view = type(self._base)(module, self._base.name)
            self.move_adapters(self._base, view)
            self._base = view
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
                "route one adapter for the whole batch, or leave it out of target_parameters (of bias='all')"
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
        route.check_layer(args[0], self)
        groups = route.groups(args[0])
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
