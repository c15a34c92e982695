"""What an adapter method writes: a little mathematics. Everything else is the wrapper's.

One `Adapter` is the adapter of one name at one layer. A method defines `delta_weight` (or `merged_weight`), and
`before`/`after` where it can do better than rebuilding ΔW in every forward.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftcore.bases import BaseWeight
from peftcore.config import options_at
from peftcore.kernels.low_rank import Factors, LowRank


class _Constants(nn.Module):
    """A module with buffers that stand in no state dict, because they follow from the configuration."""

    def make_constants(self) -> None:
        """Set these buffers; called again when `to_empty` has put memory in the place of the meta device."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        constants = [self._buffers[name] for name in self._non_persistent_buffers_set]
        were_meta = any(buffer is not None and buffer.is_meta for buffer in constants)
        super()._apply(fn, recurse)
        if were_meta:
            self.make_constants()
        return self


class Shared(_Constants):
    """What all layers of one adapter share: parameters that train, buffers that do not.

    On disk each stands once, as `base_model.<name>`. It may also hold what one forward of the whole model tells its
    layers (see `Adapter.before_forward`).
    """

    optional: frozenset[str] = frozenset()
    """Names that a directory may leave out, because they can be made again."""

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """What is saved: {name on disk: tensor}."""
        return {name: tensor.detach() for name, tensor in self.state_dict().items()}

    @torch.no_grad()
    def load_checkpoint_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy saved tensors in; names and shapes have been checked, only `optional` ones may be absent."""
        own = self.state_dict()
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


class Adapter(_Constants):
    """One adapter at one layer. Shapes: o out_features, i in_features, y (..., o), x (..., i)."""

    layer_kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    """Kinds of base layer that the method can adapt: "linear", "conv", "embedding", "norm", "parameter"."""
    follows_ties: ClassVar[bool] = False
    """Whether layers that share a target's weight are adapted too; `link` then makes them alike."""
    changes_weight: ClassVar[bool] = True
    """Whether `merged_weight` gives anything but W; False spares a 4-bit weight a second rounding."""
    generate_arguments: ClassVar[Mapping[str, Any]] = {}
    """Arguments that `generate` gets while adapters of this method act, whatever its caller says."""
    new_base: Tensor | None = None
    """A weight to put in the base's place when the adapter is injected; unloading puts the base's own back."""
    base: BaseWeight
    is_unread: bool = False
    """Whether its parameters hold nothing yet, because the tensors of a directory are about to be read."""
    disk_prefix: str = ""
    """What stands on disk between the layer's path and the adapter's own keys."""
    changes: int = 0
    """How often an attribute was set, such as a parameter, `scaling` or `training` (count)."""
    printed: tuple[Any, str]
    """(configuration, path): what `extra_repr` shows of."""
    shared: Any
    """What `make_shared` gave, in every adapter of one name; set after `__init__`, before `reset_parameters`."""
    trained_bias: Any
    """The layer's bias that trains with this adapter (`peftcore.layers.trained_bias`), or None; the wrapper adds it after."""

    def __init__(self, config: Any, base: BaseWeight, path: str):
        """Make the parameters for `base`, the layer at module `path`; raise ConfigError for what cannot be."""
        super().__init__()
        # modules in the instance: as an attribute of the class, None would hide the module of that name
        vars(self).update(
            base=base, shared=None, trained_bias=None, printed=(config, path)
        )  # nn.Module's own assignment takes longer than a small adapter does

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        self.mark_changed()

    def mark_changed(self) -> None:
        """Have whatever was computed from the weights computed anew. Setting an attribute does so by itself."""
        vars(self)["changes"] = self.changes + 1  # not by nn.Module's own assignment, which is slow

    def extra_repr(self) -> str:
        """The method's options at this layer: numbers that are not zero, and what is not at its default."""
        config, path = self.printed
        return ", ".join(f"{name}={value}" for name, value in options_at(config, path).items())

    @classmethod
    def default_targets(cls, config: Any, model: nn.Module, layers: Mapping[str, nn.Module]) -> list[str] | None:
        """Paths to adapt where `target_modules` is None, out of all base layers by path; None: those LoRA adapts."""
        return None

    @classmethod
    def completed(cls, config: Any, model: nn.Module, targets: Sequence[str]) -> Any:
        """A copy of the configuration with what the model decides, such as which of the targets end an MLP."""
        return config

    @classmethod
    def link(cls, config: Any, adapters: Mapping[str, "Adapter"]) -> None:
        """Called once when the adapters of one name are made, by path: to share parameters between layers."""

    @classmethod
    def make_shared(cls, config: Any, bases: Mapping[str, BaseWeight]) -> Shared | None:
        """What the layers at these paths share; made once for each adapter name."""
        return None

    def reset_parameters(self) -> None:
        """Set the start state; the adapted layer then computes what its base does unless the paper says otherwise."""
        raise NotImplementedError(f"{type(self).__name__} must define reset_parameters")

    def prepare_to_read(self) -> None:
        """Set what a directory does not hold, where every tensor of `checkpoint_tensors` is about to be read."""
        self.reset_parameters()

    # -- forward ---------------------------------------------------------------------------------------------

    def before(self, x: Tensor) -> Tensor:
        """The input that the base layer sees, for the adapter's own input x."""
        return x

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """The output, for the adapter's own input x and the base's output y (bias included)."""
        return y + self.base.apply(x, self.delta_weight()).to(y.dtype)

    @property
    def rank(self) -> int | None:
        """Rank (count) that ΔW has at most now, where the method bounds it by one that differs between layers."""
        return None

    @property
    def change_rank(self) -> int | None:
        """Rank (count) of ΔW as merging sees it, with a part that the initialisation subtracts from the base."""
        return self.rank

    @property
    def is_additive(self) -> bool:
        """True if `after(x, y)` is y + f(x), with f independent of the arguments of the model's call."""
        return False

    def trained_factors(self) -> LowRank | None:
        """Return the parameters A and B of s·BA, for optimisers that treat them differently; None without such."""
        return None

    def low_rank(self) -> LowRank | None:
        """The adapter as two factors, where they and nothing else act on the input in this forward and `before`
        changes nothing; the wrapper then takes the fast path of `peftcore.kernels.low_rank` wherever that is exact."""
        return None

    through_weight: bool = False
    """Whether the layer computes with `forward_weight` in place of `before` and `after`: for what they cannot do
    without knowing the weight below, such as turning the patches of a convolution."""

    def forward_weight(self, weight: Tensor) -> Tensor:
        """W' as the forward uses it, dropout included, for a canonical W in float32 or float64."""
        return self.merged_weight(weight)

    @classmethod
    def forward_arguments(cls, config: Any) -> frozenset[str] | None:
        """None: `before_forward` is not wanted. Else the further arguments, such as "task_ids", that the adapted
        model's call and `generate` take for this method."""
        return None

    @classmethod
    def before_forward(
        cls, config: Any, adapters: Mapping[str, "Adapter"], model: nn.Module, inputs: dict[str, Any]
    ) -> None:
        """Called before each forward of the whole model while an adapter of this name acts.

        inputs: the call's arguments by name, with those of `forward_arguments`; may be changed. Keep what the
        layers need in `shared` until the next call: gradient checkpointing runs layers again in the backward pass.
        """

    # -- merged ----------------------------------------------------------------------------------------------

    def check_mergeable(self) -> None:
        """Raise MergeError if no fixed weight equals this adapter, for example because it depends on the input."""

    def delta_weight(self) -> Tensor:
        """ΔW in canonical orientation, in the parameters' type; for methods where W' = W + ΔW."""
        raise NotImplementedError(f"{type(self).__name__} must define delta_weight or merged_weight")

    def exact_factors(self) -> Factors | None:
        """ΔW as two factors, where it is exactly these; they may be the parameters themselves."""
        return None

    def merged_weight(self, weight: Tensor) -> Tensor:
        """W' for a canonical W given in float32 or float64."""
        return weight + self.delta_weight().to(weight)

    def merge_into(self, weight: Tensor) -> Tensor:
        """The same for a W that may be written over."""
        return self.merged_weight(weight)

    def merged_bias(self, bias: Tensor | None) -> Tensor | None:
        """b' for the layer's bias (o,); None where there is none."""
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

    # -- disk ------------------------------------------------------------------------------------------------

    def checkpoint_keys(self) -> dict[str, str]:
        """{parameter name: its suffix on PEFT's disk}; the same word unless the method says otherwise."""
        return {name: name for name, _ in self.named_parameters() if not name.startswith(("shared.", "trained_bias."))}

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """What is saved: {suffix on disk: tensor}."""
        return {key: self._parameter(name).detach() for name, key in self.checkpoint_keys().items()}

    def repeated_keys(self) -> set[str]:
        """Suffixes that a directory may hold and that are not read, because they repeat what stands elsewhere in it."""
        return set() if self.shared is None else set(self.shared.checkpoint_tensors())

    def fits(self, key: str, tensor: Tensor) -> bool:
        """Whether a saved tensor can be loaded for one of `checkpoint_tensors`' keys."""
        return tensor.shape == self.checkpoint_tensors()[key].shape

    def load_checkpoint_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy saved tensors in; names and shapes have been checked against `checkpoint_tensors` and `fits`.

        Called where no gradients are recorded.
        """
        for name, key in self.checkpoint_keys().items():
            self._put(self._parameter(name), tensors[key])

    def _parameter(self, name: str) -> nn.Parameter:
        own = self._parameters.get(name)
        return self.get_parameter(name) if own is None else own

    def _put(self, parameter: nn.Parameter, saved: Tensor) -> None:
        """Give a parameter its saved values; one that holds nothing yet takes the tensor's memory where it can."""
        alike = saved.dtype == parameter.dtype and saved.device == parameter.device and saved.shape == parameter.shape
        if self.is_unread and alike and saved.is_contiguous():
            parameter.data = saved
        else:
            parameter.copy_(saved)

    @classmethod
    def config_to_save(cls, config: Any, adapters: Mapping[str, "Adapter"]) -> Any:
        """The configuration to write beside the tensors, for the adapters of one name by path."""
        return config

    # -- training --------------------------------------------------------------------------------------------

    @classmethod
    def regularizer(cls, config: Any, adapters: Mapping[str, "Adapter"]) -> Tensor | None:
        """A scalar to add to the loss once per optimiser step, for the adapters of one name; None for none."""
        return None

    @classmethod
    def on_step(
        cls,
        config: Any,
        adapters: Mapping[str, "Adapter"],
        step: int,
        optimizer: torch.optim.Optimizer | None,
    ) -> None:
        """Work after the optimiser's step and before its gradients are cleared; step counts from 1."""

    def training_state(self) -> dict[str, Tensor]:
        """What resuming needs beyond `checkpoint_tensors`, such as moving averages."""
        return {}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `training_state` gave."""
