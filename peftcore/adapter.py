"""The method contract: a method subclasses `Adapter` and writes its mathematics there.

One `Adapter` object belongs to one layer and one adapter name. Its parameters are plain attributes (`self.ia3_l`). The
layer calls these methods:

    reset_parameters()    initialise the parameters
    before(x)             change the layer's input     (OFT, HRA, feed-forward IA3)
    after(x, y)           change the layer's output    (LoRA, IA3, RoAd)
    delta_weight()        ΔW, for merging, export, and the default `after`; or
    exact_factors()       two factors whose product is ΔW; or
    merged_weight(W)      W', if the method does not add to the weight

A method must define `reset_parameters`, and one of `delta_weight`, `exact_factors` and `merged_weight`. All other
members have defaults.
With adapters 1..n at a layer, the output is f_n(x), where f_0 is the base layer and
f_k(x) = after_k(x, f_{k-1}(before_k(x))). Merging adapters 1..n into the weight in this order must give the same
function. So the y that `after` gets may include the output of other adapters.

Target modules, switching, mixed batches, merging, dtypes, quantised bases and saving are the same code for all methods.
`peftcore/methods/README.md` shows a complete method, step by step.

Shapes: o out_features, i in_features, r rank; x (..., i), y (..., o). A weight is canonical if it has the shape
(o, i, *kernel), however the layer stores it; `base` (`peftcore.bases.BaseWeight`) converts.
"""

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore._util import adapter_changes
from peftcore.bases import BaseWeight
from peftcore.config import options_at
from peftcore.kernels.factors import Factors
from peftcore.kernels.low_rank import LowRankBranch


class FactorNames(NamedTuple):
    """The parameters of an adapter that computes y = g∘(W x + s·BΛA x), with diagonal Λ and gain g."""

    a: str
    """Name of A (r, i)."""
    b: str
    """Name of B (o, r)."""
    diagonal: str | None = None
    """Name of Λ (r, 1); None if the adapter has none."""
    has_gain: bool = False
    """True if `Adapter.output_gain` returns g."""


class ScaleName(NamedTuple):
    """The parameter of an adapter that computes y = l∘(W x + b), or y = W (l∘x) + b."""

    name: str
    """Name of l, with as many elements as the layer has outputs or inputs."""
    of_input: bool
    """True: l scales the input."""


class _Constants(nn.Module):
    """A module whose non-persistent buffers are computed from the configuration, and are therefore never saved."""

    unrounded: ClassVar[frozenset[str]] = frozenset()
    """Parameters and buffers whose start values are not rounded to the 16 bits of a base."""

    def make_constants(self) -> None:
        """Compute the non-persistent buffers; called again after `to_empty` has moved them from the meta device."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        constants = [self._buffers[name] for name in self._non_persistent_buffers_set]
        were_meta = any(buffer is not None and buffer.is_meta for buffer in constants)
        super()._apply(fn, recurse)
        if were_meta:
            self.make_constants()
        return self


class Shared(_Constants):
    """Tensors that all layers of one adapter share: trainable parameters and fixed buffers.

    On disk each tensor is stored once, as `base_model.<name>`. A method's own subclass may also hold values of the
    current forward pass, which `Adapter.before_forward` sets.
    """

    optional: frozenset[str] = frozenset()
    """Names that a saved adapter may lack, because they can be recomputed."""

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """Return the tensors to save, {name on disk: tensor}."""
        return {name: tensor.detach() for name, tensor in self.state_dict().items()}

    @torch.no_grad()
    def load_checkpoint_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy saved tensors in.

        Args:
            tensors: {name on disk: tensor}; names and shapes are already checked. Only `optional` names may be absent.
        """
        state_dict = self.state_dict()
        for name, tensor in tensors.items():
            state_dict[name].copy_(tensor)


class Adapter(_Constants):
    """The adapter of one name at one layer.

    Args:
        config: the adapter's configuration. Options may differ by layer, as with `rank_pattern`.
        base: the view on the layer's weight: sizes, kind, device, and products in canonical orientation.
        path: the layer's path in the model.

    Raises:
        ConfigError: an option does not fit this layer.

    Parameters are created in float32 or wider, on the layer's device. A subclass creates them in its `__init__` and
    initialises them in `reset_parameters`.
    """

    # -- set by a method's class -----------------------------------------------------------------------------------

    layer_kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    """Kinds of layer that the method can adapt: "linear", "conv", "embedding", "norm", "parameter"."""
    follows_ties: ClassVar[bool] = False
    """True if layers that share the weight of a target are adapted as well; `link` must then tie their adapters."""
    changes_weight: ClassVar[bool] = True
    """False if `merged_weight` returns W itself; spares a quantised weight a second rounding."""
    dropout_option: ClassVar[str] = ""
    """Name of the option that holds the probability of `add_dropout`; empty if the method has no such dropout."""
    generate_arguments: ClassVar[Mapping[str, Any]] = {}
    """Arguments that `generate` always gets while adapters of this method are active."""
    former_tensors: ClassVar[Mapping[str, str]] = {}
    """{name of a tensor of older versions of HF PEFT, with another meaning: what to do about such an adapter}"""
    weight_space_forward: bool = False
    """True if the layer computes with the weight `forward_weight(W)` in place of `before` and `after`.

    For methods whose forward needs the weight itself, such as a rotation of the patches of a convolution. A class or a
    single adapter may set it.
    """

    scaling_unit: float = 1
    """HF PEFT's `layer.scaling` for `scaling` = 1, where the two differ. A class or a single adapter may set it."""

    # -- set by the layer, to be read by a method --------------------------------------------------------------------

    base: BaseWeight
    """The view on the layer's weight."""
    beside: Mapping[str, "Adapter"] = {}
    """{name: adapter} of the layer's adapters, this one included, once it is in its layer; only if `sees_others`."""
    shared: Any
    """The `Shared` of this adapter name, or None; set after `__init__` and before `reset_parameters`."""
    new_base: Tensor | None = None
    """A weight that replaces the base's (LoftQ), set in `reset_parameters`; unloading restores the original."""
    is_unread: bool = False
    """True while the parameters are placeholders, because a saved adapter is about to be read into them."""
    frozen: frozenset[str] = frozenset()
    """Names of parameters that are saved and never train."""
    disk_prefix: str = ""
    """Text between the layer's path and the adapter's keys in a saved adapter."""
    changes: int = 0
    """Assignments of attributes so far (count), such as `scaling`; caches compare this number to notice changes."""
    printed: tuple[Any, str]
    """(configuration, path), for `extra_repr`."""
    trained_bias: Any
    """The layer's bias that trains with this adapter (`peftcore.layers.trained_bias`), or None."""

    def __init__(self, config: Any, base: BaseWeight, path: str):
        super().__init__()
        # written to the instance directly: nn.Module's own assignment takes longer than a small adapter's forward,
        # and a class attribute None would hide a submodule of the same name
        vars(self).update(base=base, shared=None, trained_bias=None, printed=(config, path))

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "through_weight" in vars(cls):
            cls.weight_space_forward = vars(cls)["through_weight"]
            del cls.through_weight  # type: ignore[misc]
            _warn_of_old_name(cls.__name__)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        self.mark_changed()

    @property
    def through_weight(self) -> bool:
        """Deprecated name of `weight_space_forward`."""
        _warn_of_old_name(type(self).__name__)
        return self.weight_space_forward

    @through_weight.setter
    def through_weight(self, value: bool) -> None:
        _warn_of_old_name(type(self).__name__)
        self.weight_space_forward = value

    def mark_changed(self) -> None:
        """Invalidate all values that were computed from the weights. Assigning an attribute has the same effect."""
        vars(self)["changes"] = self.changes + 1  # nn.Module's own assignment is slow
        adapter_changes.note()

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Set `requires_grad` of all parameters but the frozen ones."""
        super().requires_grad_(requires_grad)
        for name in self.frozen:
            self._parameter(name).requires_grad = False
        return self

    def extra_repr(self) -> str:
        """Return the options at this layer that are not at their defaults, and all non-zero numbers."""
        config, path = self.printed
        return ", ".join(f"{name}={value}" for name, value in options_at(config, path).items())

    # -- making an adapter -----------------------------------------------------------------------------------------

    @classmethod
    def default_targets(cls, config: Any, model: nn.Module, layers: Mapping[str, nn.Module]) -> list[str] | str | None:
        """Return the layers to adapt if the configuration names none.

        Args:
            config: a configuration with `target_modules=None`.
            model: the model.
            layers: {path: module} of all modules of the base model; the base layer in place of its wrapper.

        Returns:
            Paths of the layers, or "all-linear" for every linear layer except the head. None if the method has no rule
            of its own; `detect(model).targets_for(method)` then names the layers.
        """
        return None

    @classmethod
    def completed(cls, config: Any, model: nn.Module, targets: Sequence[str]) -> Any:
        """Return a copy of the configuration with options filled in that depend on the model.

        IA3, for example, writes down which targets are the last layer of a feed-forward block.

        Args:
            config: the user's configuration, which is never changed.
            model: the model.
            targets: paths of the layers to adapt.
        """
        return config

    @classmethod
    def link(cls, config: Any, adapters: Mapping[str, "Adapter"]) -> None:
        """Share parameters between layers; called once, when all adapters of one name are made.

        Args:
            config: the configuration.
            adapters: {path: adapter}.
        """

    @classmethod
    def make_shared(cls, config: Any, bases: Mapping[str, BaseWeight]) -> Shared | None:
        """Make the tensors that all layers of one adapter share; None if there are none.

        Args:
            config: the configuration.
            bases: {path: view on the layer's weight}.
        """
        return None

    def reset_parameters(self) -> None:
        """Initialise the parameters; unless the paper says otherwise, the layer then equals its base."""
        raise NotImplementedError(f"{type(self).__name__} must define reset_parameters")

    def prepare_to_read(self) -> None:
        """Initialise the parameters that a saved adapter does not hold; the default initialises all of them.

        Called before every tensor of `checkpoint_tensors` is read from a saved adapter.
        """
        self.reset_parameters()

    def placed(self) -> None:
        """Delete tensors that only the initialisation needs; called after the adapter is in its layer."""

    @classmethod
    def all_placed(cls, adapters: Mapping[str, "Adapter"]) -> bool:
        """Change base weights for good if the initialisation asks for it; called when all adapters are in their layers.

        Args:
            adapters: {path: adapter} of one configuration.

        Returns:
            True if base weights have changed.
        """
        return False

    # -- forward ---------------------------------------------------------------------------------------------------

    def before(self, x: Tensor) -> Tensor:
        """Return the input of f_{k-1}: of the base layer, or of the base layer with the adapters before this one.

        Args:
            x: the adapter's input (..., i).
        """
        return x

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the output (..., o).

        Parameters are cast to the type of the activations, never the activations to theirs.

        Args:
            x: the adapter's input (..., i), the one that `before` got.
            y: the output of the layer below (..., o), bias included.
        """
        return y + self.base.apply(x, self.delta_weight()).to(y.dtype)

    def add_dropout(self) -> None:
        """Add the submodule `dropout` for the adapter's input, unless the dropout probability is 0.

        The submodule is an `nn.Dropout`, so code that changes all dropout of a model also changes the adapters'
        dropout.
        """
        if p := getattr(self.printed[0], self.dropout_option):
            self.add_module("dropout", nn.Dropout(p))

    @property
    def dropout_module(self) -> nn.Dropout | None:
        """The dropout of this adapter's input; None if there is none."""
        return self._modules.get("dropout")  # type: ignore[return-value]

    @property
    def dropout_probability(self) -> float:
        """Probability with which this forward pass drops an element of the input; 0 in evaluation mode."""
        dropout = self._modules.get("dropout")
        return dropout.p if dropout is not None and dropout.training else 0.0  # type: ignore[return-value]

    def dropped(self, x: Tensor) -> Tensor:
        """Return the input after dropout; x itself if there is none now."""
        p = self.dropout_probability
        return F.dropout(x, p) if p else x

    @property
    def rank(self) -> int | None:
        """Current upper bound of the rank of ΔW (count), for methods in which it differs between layers; else None."""
        return None

    @property
    def change_rank(self) -> int | None:
        """Rank (count) of the ΔW that merging adds: 2r if a start is subtracted (PiSSA); None if `rank` is None."""
        return self.rank

    @property
    def sees_others(self) -> bool:
        """True if the adapter computes with other adapters of its layer, which `beside` then holds."""
        return False

    @property
    def is_additive(self) -> bool:
        """True if `after(x, y)` is y + f(x), with f independent of the arguments of the model's call."""
        return False

    def trained_factors(self) -> LowRankBranch | None:
        """Return the parameters A and B of s·BA, for optimisers that treat them differently; None without such."""
        return None

    def low_rank(self) -> LowRankBranch | None:
        """Return the adapter as two factors, so that the layer can take its fast paths; None for the general path.

        Return factors only if they are all that the adapter does in this forward pass, and `before` returns x.
        """
        return None

    def factor_names(self) -> FactorNames | None:
        """Return the names of the parameters if `low_rank` returns only them, `scaling` and `output_gain`; else None.

        A layer that decodes then reads them itself. What is returned may change only if an attribute is assigned.
        """
        return None

    def scale_name(self) -> ScaleName | None:
        """Return the name of a parameter that scales the output or the input, if that is all in evaluation mode.

        Else return None. A layer that decodes then reads it itself. What is returned may change only if an attribute is
        assigned.
        """
        return None

    def output_gain(self) -> Tensor | None:
        """Return g (o,) of `FactorNames`; None if only `low_rank` can tell what the adapter computes now."""
        return None

    def forward_weight(self, weight: Tensor) -> Tensor:
        """Return W' for a forward pass, dropout included; used with `weight_space_forward`.

        Args:
            weight: the canonical weight (o, i, *kernel), in float32 or float64.
        """
        return self.merged_weight(weight)

    @classmethod
    def forward_arguments(cls, config: Any) -> frozenset[str] | None:
        """Return the names of further arguments of the model's call and of `generate`, such as "task_ids".

        Returns:
            Names, possibly none; `before_forward` is then called. None if the method has no `before_forward`.
        """
        return None

    @classmethod
    def before_forward(
        cls, config: Any, adapters: Mapping[str, "Adapter"], model: nn.Module, inputs: dict[str, Any]
    ) -> None:
        """Prepare a forward pass of the whole model; called while an adapter of this name is active.

        Store what the layers need in `shared`, and leave it there until the next call: gradient checkpointing runs
        layers again in the backward pass.

        Args:
            config: the configuration.
            adapters: {path: adapter} of one name.
            model: the model that is called.
            inputs: the call's arguments by name, including `forward_arguments`; may be changed in place.
        """

    @classmethod
    def refused_generate_options(cls, config: Any) -> Mapping[str, str]:
        """Return {option of `generate` that may not be set while the adapter is active: reason}."""
        return {}

    # -- merging ---------------------------------------------------------------------------------------------------

    def replaced_rows(self) -> Collection[int]:
        """Return the numbers of the weight's rows that the adapter replaces; two active adapters must not share any."""
        return ()

    def check_mergeable(self) -> None:
        """Check that a fixed weight can equal this adapter.

        Raises:
            MergeError: no weight can, for example because the adapter depends on the input.
        """

    def check_mergeable_with(self, others: "Iterable[Adapter]") -> None:
        """Check that this adapter may be merged into a weight after other adapters.

        Args:
            others: adapters that are merged before this one.

        Raises:
            MergeError: this adapter would overwrite what another one has merged.
        """

    def changes_like(self, other: "Adapter") -> bool:
        """Return True if both adapters, at two layers of one shared weight, always change this weight alike.

        Args:
            other: an adapter of the same name at another layer that has the weight.
        """
        return False

    def delta_weight(self) -> Tensor:
        """Return ΔW = W' − W in canonical orientation (o, i, *kernel), in the parameters' type.

        By default the product of `exact_factors`, for methods without convolutions.
        """
        if (factors := self.exact_factors()) is None:
            raise NotImplementedError(f"{type(self).__name__} must define delta_weight, merged_weight or exact_factors")
        product = factors.b[0] @ factors.a[0]
        return product if factors.scaling == 1 else factors.scaling * product

    def exact_factors(self) -> Factors | None:
        """Return ΔW as two factors if it equals their product exactly, else None; they may be the parameters."""
        return None

    def merged_weight(self, weight: Tensor) -> Tensor:
        """Return W'.

        Args:
            weight: the canonical weight W (o, i, *kernel), in float32 or float64; must not be changed in place.
        """
        return weight + self.delta_weight().to(weight)

    def merge_into(self, weight: Tensor) -> Tensor:
        """Return W' as `merged_weight` does, for a weight that may be overwritten.

        Args:
            weight: the canonical weight W; its memory may hold the result.
        """
        return self.merged_weight(weight)

    def merged_bias(self, bias: Tensor | None) -> Tensor | None:
        """Return the bias after merging.

        Args:
            bias: the layer's bias (o,), or None if it has none.

        Raises:
            MergeError: the adapter adds a bias, and the layer has none.
        """
        return bias

    def bias_change(self) -> Tensor | None:
        """Return Δb (o,) of the layer's bias; None if the adapter does not change the bias."""
        bias = self.base.unmerged_bias
        changed = self.merged_bias(bias)
        if changed is None or changed is bias:
            return None
        if bias is None:
            return changed
        return None if torch.equal(changed.to(bias), bias) else changed.double() - bias.double()

    # -- saving and loading ----------------------------------------------------------------------------------------

    def shown_parameter(self, name: str) -> Tensor:
        """Return the tensor that HF PEFT's attributes show as `name`; for a tied adapter, that of its source."""
        return self._parameter(name)

    def checkpoint_keys(self) -> dict[str, str]:
        """Return {parameter name: its key suffix in PEFT's format}; by default both are equal."""
        return {name: name for name, _ in self.named_parameters() if not name.startswith(("shared.", "trained_bias."))}

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """Return the tensors to save, {key suffix: tensor}."""
        return {key: self._parameter(name).detach() for name, key in self.checkpoint_keys().items()}

    def repeated_keys(self) -> set[str]:
        """Return key suffixes that a saved adapter may hold and that are ignored, because they repeat other tensors."""
        return set() if self.shared is None else set(self.shared.checkpoint_tensors())

    def repeated_tensors(self) -> dict[str, Tensor]:
        """Return {key suffix: tensor} of the `repeated_keys` that are saved, because HF PEFT misses them in a file."""
        return {}

    def fits(self, key: str, tensor: Tensor) -> bool:
        """Return True if a saved tensor can be loaded.

        Args:
            key: a key of `checkpoint_tensors`.
            tensor: the saved tensor; its shape may differ if the method can adjust.
        """
        return tensor.shape == self.checkpoint_tensors()[key].shape

    def load_checkpoint_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy saved tensors in; runs without gradients.

        Args:
            tensors: {key suffix: tensor}; keys and shapes are already checked by `checkpoint_tensors` and `fits`.
        """
        for name, key in self.checkpoint_keys().items():
            self._put(self._parameter(name), tensors[key])

    def before_load(self, module: nn.Module, name: str, saved: Tensor) -> None:
        """Prepare to load one tensor of a model's state dict, which must fit; the default leaves the tensor as it is.

        Args:
            module: the adapter, or the module inside of it, that holds the tensor.
            name: the tensor's name in the module.
            saved: the tensor of the state dict.
        """

    def _parameter(self, name: str) -> nn.Parameter:
        parameter = self._parameters.get(name)
        if parameter is not None:
            return parameter
        path, _, leaf = name.rpartition(".")
        buffer = self.get_submodule(path)._buffers.get(leaf)  # a saved tensor may be a buffer
        return self.get_parameter(name) if buffer is None else buffer  # type: ignore[return-value]

    def _put(self, parameter: nn.Parameter, saved: Tensor) -> None:
        """Write saved values into a parameter; an unread parameter takes over the saved tensor's memory if possible."""
        same = saved.dtype == parameter.dtype and saved.device == parameter.device and saved.shape == parameter.shape
        if self.is_unread and same and saved.is_contiguous():
            parameter.data = saved
        else:
            parameter.copy_(saved)

    @classmethod
    def config_of_file(cls, config: Any, read_tensors: Callable[[], Mapping[str, Tensor]]) -> Any:
        """Return the configuration that fits a file's tensors, where HF PEFT saves another one.

        Args:
            config: the configuration of the file.
            read_tensors: returns the file's tensors by key.
        """
        return config

    @classmethod
    def config_to_save(cls, config: Any, adapters: Mapping[str, "Adapter"]) -> Any:
        """Return the configuration to save beside the tensors, for example with the ranks after pruning.

        Args:
            config: the configuration.
            adapters: {path: adapter} of one name.
        """
        return config

    # -- training --------------------------------------------------------------------------------------------------

    regularizes_model_loss: ClassVar[bool] = False
    """True if the regulariser is part of the loss that the model returns, as in HF PEFT."""

    @classmethod
    def regularizer(cls, config: Any, adapters: Mapping[str, "Adapter"]) -> Tensor | None:
        """Return a scalar to add to the loss once per optimiser step; None if the method has no regulariser.

        Args:
            config: the configuration.
            adapters: {path: adapter} of one name.
        """
        return None

    @classmethod
    def on_step(
        cls,
        config: Any,
        adapters: Mapping[str, "Adapter"],
        step: int,
        optimizer: torch.optim.Optimizer | None,
    ) -> None:
        """Update the adapters after an optimiser step, before the gradients are cleared.

        Args:
            config: the configuration.
            adapters: {path: adapter} of one name.
            step: number of the step, from 1.
            optimizer: the optimiser, whose state must follow if parameters change size; None if it is not known.
        """

    def training_state(self) -> dict[str, Tensor]:
        """Return tensors that resuming needs beside `checkpoint_tensors`, such as moving averages."""
        return {}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore the state that `training_state` returned.

        Args:
            state: {key: tensor}.
        """


def _warn_of_old_name(name: str) -> None:
    warnings.warn(
        f"{name}: `through_weight` is now `weight_space_forward`; the old name will be removed in the next version",
        DeprecationWarning,
        stacklevel=3,
    )
