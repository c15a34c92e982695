"""How an adapter reads and writes a base layer, whatever its kind and storage.

Weights are seen in one canonical orientation, whatever the layer keeps: (o, i) for linear-like layers, (o, i/groups,
*kernel) for convolutions, (d, v) for embeddings, which are linear maps of one-hot rows.

Shapes: o out_features, i in_features, d embedding dimension, v vocabulary, r rank.
"""

import copy
import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from peftcore.errors import MergeError


class WeightVersion:
    """A stored weight at one time. Equal until it is replaced, moved or changed.

    An edit through `.data` is not seen.
    """

    __slots__ = ("memory", "pointer", "version", "weight")

    def __init__(self, weight: Tensor):
        self.weight, self.pointer, self.version = weight, weight.data_ptr(), weight._version
        self.memory = weakref.ref(weight.untyped_storage())
        """The address of freed memory can come back with another weight in it."""

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, WeightVersion)
            and other.weight is self.weight
            and other.pointer == self.pointer
            and other.memory() is self.memory()
            and other.version == self.version
        )

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return type(None), ()  # a copy is of no weight


OWN_STATE = "_own_state"
"""Attribute of a layer whose weight an adapter's start has replaced (LoftQ): what was there before."""

UNMERGED_STATE = "_unmerged_state"
"""Attribute of a layer that holds its own parameters while merged ones stand in their place."""


class BaseWeight(ABC):
    """A view on one base layer; holds no weight of its own."""

    kind: ClassVar[str]
    """"linear", "conv", "embedding", "norm" or "parameter" (raw): what the layer does with its input."""

    def __init__(self, layer: nn.Module):
        self.layer: Any = layer
        self._storage = type(layer._parameters.get("weight"))

    def still_fits(self, layer: nn.Module | None) -> bool:
        """Whether this is the view on `layer`, and its weight is stored as it was."""
        return layer is self.layer and type(self.layer._parameters.get("weight")) is self._storage

    def forget(self) -> None:  # noqa: B027
        """Let go of what was computed from the weight, which may be another one now."""

    # -- geometry ------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def in_features(self) -> int:
        """i: size of the input's feature axis (vocabulary size for an embedding)."""

    @property
    @abstractmethod
    def out_features(self) -> int:
        """o: size of the output's feature axis."""

    @property
    def kernel(self) -> tuple[int, ...]:
        """Spatial kernel size of a convolution; () for every other layer."""
        return ()

    @property
    def count(self) -> int:
        """How many weights are stacked: the experts of a raw expert parameter, 1 for every other layer."""
        return 1

    # -- storage -------------------------------------------------------------------------------------------------

    quantized: ClassVar[bool] = False
    """Whether the layer keeps its weight in 4 or 8 bits."""

    @property
    def device(self) -> torch.device:
        return self.layer.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the dense weight that `read` gives."""
        return self.layer.weight.dtype

    @property
    def bias(self) -> Tensor | None:
        return self.layer.bias if hasattr(self.layer, "bias") else None

    @property
    def unmerged_bias(self) -> Tensor | None:
        """The bias without what is merged into it."""
        own = self.layer.__dict__.get(self.unmerged_attribute)
        return self.bias if own is None else self.stored(own, "bias")

    def read(self) -> Tensor:
        """The dense weight in canonical orientation; may share memory with the layer."""
        return self.read_from({"weight": self.layer.weight})

    @abstractmethod
    def read_from(self, state: Mapping[str, Any]) -> Tensor:
        """The same of what `state` returned, now or before something was written."""

    def stored(self, state: Mapping[str, Any], name: str = "weight") -> Any:
        """The weight, or the bias if there is one, as the layer stores it, in what `state` returned."""
        kept = state.get(name)
        if not isinstance(kept, dict):
            return kept
        twin = copy.copy(self.layer.parametrizations[name])
        vars(twin)["_parameters"] = kept
        return twin()

    @property
    def unmerged_attribute(self) -> str:
        """Attribute of the layer that holds its own parameters while merged ones stand in their place."""
        return UNMERGED_STATE

    def read_unmerged(self) -> Tensor:
        """The dense weight without what is merged into it."""
        return self._read_aside(self.unmerged_attribute)

    def read_own(self) -> Tensor:
        """The dense weight without what is merged into it, and before an adapter's start replaced it."""
        replaced = OWN_STATE in self.layer.__dict__
        return self._read_aside(OWN_STATE if replaced else self.unmerged_attribute)

    def _read_aside(self, attribute: str) -> Tensor:
        """The dense weight of the state that stands aside under an attribute, or the weight in place if none does."""
        own = self.layer.__dict__.get(attribute)
        return self.read() if own is None else self.read_from(own)

    def unmerged_version(self) -> "WeightVersion | None":
        """The state of the weight that `read_unmerged` gives, to compare later; None if it cannot be told, as while
        `torch.compile` traces."""
        if torch.compiler.is_compiling():
            return None
        state = self.layer.__dict__.get(self.unmerged_attribute)
        weight = self.layer._parameters.get("weight") if state is None else state.get("weight")
        if not isinstance(weight, Tensor) or weight.is_inference():
            return None
        return WeightVersion(weight)

    @abstractmethod
    def write(self, weight: Tensor) -> None:
        """Give the layer a new weight (canonical, any float type); the old parameter object is left intact."""

    def write_bias(self, bias: Tensor) -> None:
        """Give the layer a new bias (o,); the old parameter object is left intact."""
        self._put("bias", bias.to(self.layer.bias))

    def _put(self, name: str, values: Tensor) -> None:
        """Give the layer a new parameter `name`; MergeError if the layer cannot hold these values."""
        kept = _kept(self.layer, name)
        if isinstance(kept, ParametrizationList):
            _put_parametrized(kept, values, f"{type(self.layer).__name__}.{name}")
        elif kept is None:
            raise MergeError(
                f"{name} of this {type(self.layer).__name__} is no parameter but is computed before each forward, as "
                "torch.nn.utils.weight_norm does; call remove_weight_norm before get_peft_model, or keep the adapter "
                "unmerged"
            )
        else:
            self.layer._parameters[name] = nn.Parameter(values.contiguous(), requires_grad=False)

    def state(self) -> dict[str, Any]:
        """References to what `write` replaces: restoring them is exact to the bit and copies nothing."""
        state: dict[str, Any] = {}
        for name in ("weight", "bias"):
            kept = _kept(self.layer, name)
            if isinstance(kept, ParametrizationList):
                state[name] = dict(kept._parameters)
            elif name in self.layer._parameters:
                state[name] = kept
        return state

    def follow(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Bring what `state` returned, once its parameters have been moved, to where they are now."""

    def restore(self, state: dict[str, Any]) -> None:
        """Put back what `state` returned."""
        for name, value in state.items():
            if isinstance(value, dict):
                self.layer.parametrizations[name]._parameters.update(value)
            else:
                self.layer._parameters[name] = value

    def per_output(self, values: Tensor) -> Tensor:
        """Values (o,) in the shape that broadcasts over the feature axis of this layer's output."""
        return values.view(-1, *(1 for _ in self.kernel))

    # -- mathematics ---------------------------------------------------------------------------------------------

    @abstractmethod
    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer's own map with another weight (canonical) and no bias, in x's floating type."""

    @abstractmethod
    def pointwise(self, h: Tensor, weight: Tensor) -> Tensor:
        """A map (o, r) over the feature axis of what `apply` gave."""

    def computes_in(self, x: Tensor) -> torch.dtype | None:
        """The type in which the layer's output for x is x Wᵀ + b, all frozen; None where it is more than that.

        Then `product` gives that output for an x of this type, and `peftcore.kernels.low_rank` may take the layer's place.
        """
        return None

    def product(self, x: Tensor) -> Tensor:
        """x Wᵀ + b (n, o) in fresh memory and without gradient, for x (n, i) of the type that `computes_in` gave."""
        raise NotImplementedError(f"{type(self).__name__} has no product")

    def prefers_product(self, x: Tensor) -> bool:
        """Whether `product`, for x (..., i) flattened, is a faster way to the layer's own output."""
        return False

    def weight_to_keep(self) -> Tensor | None:
        """What autograd keeps to form x's gradient: the layer's own weight, or None where `read` makes it again."""
        return self.read()

    @abstractmethod
    def add_pointwise(self, y: Tensor, h: Tensor, weight: Tensor) -> Tensor:
        """y + pointwise(h, weight), in one pass over y where the layer allows it."""


def _kept(layer: nn.Module, name: str) -> nn.Parameter | ParametrizationList | None:
    """What a layer keeps its parameter `name` as; None for a tensor that is no parameter."""
    if (parametrizations := layer._modules.get("parametrizations")) is not None and name in parametrizations._modules:
        return parametrizations._modules[name]  # type: ignore[return-value]
    return layer._parameters.get(name)


@torch.no_grad()
def _put_parametrized(kept: ParametrizationList, values: Tensor, name: str) -> None:
    """Give a parametrised tensor new values by new originals; MergeError if the parametrisation cannot make them."""
    steps = ", ".join(type(step).__name__ for step in kept)
    refused = MergeError(
        f"the parametrisation {steps} of {name} cannot hold the merged "
        "values; call torch.nn.utils.parametrize.remove_parametrizations before get_peft_model, or keep the adapter "
        "unmerged"
    )
    before, originals = dict(kept._parameters), values
    for step in reversed(list(copy.deepcopy(kept))):  # some right inverses change the step itself
        if not hasattr(step, "right_inverse"):
            raise refused
        try:
            originals = step.right_inverse(originals)  # type: ignore[operator]
        except ValueError as error:  # such as: the matrix is not orthogonal
            raise refused from error
    many = {"original": originals} if kept.is_tensor else {f"original{n}": part for n, part in enumerate(originals)}
    kept._parameters.update({key: nn.Parameter(part.clone(), requires_grad=False) for key, part in many.items()})
    precision = torch.finfo(values.dtype).eps
    if not torch.allclose(kept(), values, rtol=16 * precision, atol=16 * precision * float(values.abs().max())):
        kept._parameters.update(before)
        raise refused
