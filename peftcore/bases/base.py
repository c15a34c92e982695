"""The view through which adapters read and write a base layer, independent of the layer's class and storage.

A view presents the weight in one canonical orientation, whatever the layer stores: (o, i) for linear layers, (o,
i/groups, *kernel) for convolutions, (d, v) for embeddings, which are linear maps of one-hot rows.

Shapes: o out_features, i in_features, d embedding dimension, v vocabulary size, r rank, n flattened tokens.
"""

import copy
import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from peftcore.bases.grid import Grid
from peftcore.bases.offload import execution_device, offload_hook, offloaded_tensor, replace_offloaded
from peftcore.errors import MergeError


class WeightVersion:
    """A stored weight at one point in time, for comparison.

    Two versions are equal as long as the weight is not replaced, moved or changed in place. Edits through `.data` are
    not detected.
    """

    __slots__ = ("memory", "pointer", "version", "weight")

    def __init__(self, weight: Tensor):
        self.weight, self.pointer, self.version = weight, weight.data_ptr(), weight._version
        self.memory = weakref.ref(weight.untyped_storage())
        """Freed memory can be reused at the same address by another weight, so the address alone is not enough."""

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, WeightVersion)
            and other.weight is self.weight
            and other.pointer == self.pointer
            and other.memory() is self.memory()
            and other.version == self.version
        )

    def is_of(self, weight: Tensor | None) -> bool:
        """Return True if the weight is the one that has this version, and still has it."""
        return (
            weight is not None
            and weight is self.weight
            and weight.data_ptr() == self.pointer
            and weight._version == self.version
            and self.memory() is not None
        )

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return type(None), ()  # a copied model has another weight


ORIGINAL_STATE = "_original_state"
"""Attribute of a layer whose weight an initialisation has replaced (LoftQ); holds the state before."""

UNMERGED_STATE = "_unmerged_state"
"""Attribute of a layer with merged adapters; holds the state before the merge."""


class BaseWeight(ABC):
    """A view of one base layer.

    The view stores no weight. A "state" is the dictionary that `state()` returns: the layer's stored parameters by
    name. `merge` keeps the state from before the merge, and unmerging puts that state back.
    """

    kind: ClassVar[str]
    """Kind of layer: "linear", "conv", "embedding", "norm" or "parameter" (a raw parameter)."""

    def __init__(self, layer: nn.Module):
        self.layer: Any = layer
        self.storage = type(layer._parameters.get("weight"))

    def still_fits(self, layer: nn.Module | None) -> bool:
        """Return True if this is a view of `layer` and the storage class of its weight has not changed."""
        return layer is self.layer and type(self.layer._parameters.get("weight")) is self.storage

    def clear_cache(self) -> None:  # noqa: B027
        """Drop values that were computed from the weight, because the weight may have changed."""

    def prepare_layer(self) -> None:  # noqa: B027
        """Change the layer as adapters need it. Called when it gets its first adapter; a view alone changes nothing."""

    # -- geometry ------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def in_features(self) -> int:
        """i: size of the input's feature axis; vocabulary size for an embedding, channels for a convolution."""

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
        """Number of stacked weights: the number of experts of a raw expert parameter, 1 for every other layer."""
        return 1

    # -- storage -------------------------------------------------------------------------------------------------

    quantized: ClassVar[bool] = False
    """True if the layer stores its weight in few bits, such as 4 or 8."""

    backend: ClassVar[str | None] = None
    """HF PEFT's name of the package that stores the weight, such as "bnb 4bit"; None for PyTorch."""

    @classmethod
    def refusal(cls, layer: nn.Module) -> str | None:
        """Return the reason why this view cannot read a layer of its class, and what can be done; None if it can.

        Args:
            layer: A layer for whose class, or whose weight's class, the view is registered.
        """
        return None

    @property
    def activation_dtype(self) -> torch.dtype | None:
        """Dtype in which the layer multiplies; None if a quantised layer has none of its own."""
        return self.dtype

    @property
    def shared_weight(self) -> Tensor:
        """The stored tensor by whose identity layers with a tied weight are recognised."""
        return self.layer.weight

    @property
    def device(self) -> torch.device:
        """Device of the weight; of an offloaded weight, the device on which the layer computes."""
        device = self.layer.weight.device
        hook = offload_hook(self.layer) if device.type == "meta" else None
        return device if hook is None else execution_device(hook)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the dense weight that `read` returns."""
        return self.layer.weight.dtype

    @property
    def bias(self) -> Tensor | None:
        """The layer's current bias (o,), merged changes included; None if the layer has no bias."""
        bias = self.layer.bias if hasattr(self.layer, "bias") else None
        hook = offload_hook(self.layer) if bias is not None and bias.is_meta else None
        return bias if hook is None else offloaded_tensor(hook, "bias")

    @property
    def unmerged_bias(self) -> Tensor | None:
        """The bias (o,) without merged changes; None if the layer has no bias."""
        unmerged = self.layer.__dict__.get(self.unmerged_attribute)
        return self.bias if unmerged is None else self.stored(unmerged, "bias")

    def read(self) -> Tensor:
        """Return the current dense weight in canonical orientation; it may share memory with the layer."""
        weight = self.layer.weight
        hook = offload_hook(self.layer) if weight.is_meta else None
        return self.read_from({"weight": weight if hook is None else offloaded_tensor(hook, "weight")})

    @abstractmethod
    def read_from(self, state: Mapping[str, Any]) -> Tensor:
        """Return the dense weight of a state in canonical orientation.

        Args:
            state: A value that `state()` returned, now or before a `write`.
        """

    def stored(self, state: Mapping[str, Any], name: str = "weight") -> Any:
        """Return a parameter of a state in the form that the layer stores, such as packed 4-bit codes.

        Args:
            state: A value that `state()` returned.
            name: "weight" or "bias".

        Returns:
            The stored tensor; None if the state has no such parameter.
        """
        value = state.get(name)
        if not isinstance(value, dict):
            return value
        parametrization = copy.copy(self.layer.parametrizations[name])
        vars(parametrization)["_parameters"] = value
        return parametrization()

    @property
    def unmerged_attribute(self) -> str:
        """Name of the layer's attribute that holds the state from before a merge."""
        return UNMERGED_STATE

    def read_unmerged(self) -> Tensor:
        """Return the dense canonical weight without merged changes."""
        return self._read_saved(self.unmerged_attribute)

    def read_original(self) -> Tensor:
        """Return the dense canonical weight without merged changes and from before LoftQ replaced the weight."""
        replaced = ORIGINAL_STATE in self.layer.__dict__
        return self._read_saved(ORIGINAL_STATE if replaced else self.unmerged_attribute)

    def _read_saved(self, attribute: str) -> Tensor:
        """Return the dense weight of the state saved under an attribute; the current weight if none is saved."""
        state = self.layer.__dict__.get(attribute)
        return self.read() if state is None else self.read_from(state)

    @property
    def holds_its_own_weight(self) -> bool:
        """True if the weight is an unquantised parameter, and neither merged with adapters nor replaced by LoftQ."""
        saved = (self.unmerged_attribute, ORIGINAL_STATE)
        is_parameter = isinstance(_stored_parameter(self.layer, "weight"), nn.Parameter)
        return is_parameter and not self.quantized and not any(name in self.layer.__dict__ for name in saved)

    def unmerged_version(self) -> "WeightVersion | None":
        """Return the version of the weight that `read_unmerged` reads.

        Returns:
            A value to compare with a later version; None if the version is unknown, as during `torch.compile`.
        """
        weight = self._versioned_weight()
        return None if weight is None else WeightVersion(weight)

    def has_unmerged_version(self, version: "WeightVersion | None") -> bool:
        """Return True if `unmerged_version` would return this version."""
        return version is not None and version.is_of(self._versioned_weight())

    def _versioned_weight(self) -> Tensor | None:
        """Return the stored tensor that `read_unmerged` reads; None if its version is unknown."""
        if torch.compiler.is_compiling():
            return None
        state = self.layer.__dict__.get(self.unmerged_attribute)
        weight = self.layer._parameters.get("weight") if state is None else state.get("weight")
        return weight if isinstance(weight, Tensor) and not weight.is_inference() else None

    def check_writable(self) -> None:  # noqa: B027
        """Raise MergeError if the layer's storage can hold no other weight."""

    @abstractmethod
    def write(self, weight: Tensor) -> None:
        """Give the layer a new weight; the previous parameter object is not modified.

        Args:
            weight: The new dense weight in canonical orientation, of any floating-point dtype.

        Raises:
            MergeError: The layer's parametrisation cannot represent this weight.
        """

    def grid(self) -> Grid | None:
        """Return the values that a quantised weight can take with its present scales; None if they are not known."""
        return None

    def write_codes(self, codes: Tensor) -> None:
        """Give a quantised layer new codes and keep its scales; the previous parameter object is not modified.

        Args:
            codes: Positions (o, i) in the levels of `grid`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no write_codes")

    def oriented(self, weight: Tensor) -> Tensor:
        """Convert a weight from canonical to stored orientation."""
        return weight

    def write_bias(self, bias: Tensor) -> None:
        """Give the layer a new bias (o,); the previous parameter object is not modified."""
        old = self.bias
        assert old is not None
        self._replace("bias", bias.to(old))

    def _replace(self, name: str, values: Tensor) -> None:
        """Give the layer a new parameter `name`; MergeError if the layer cannot hold these values."""
        stored = _stored_parameter(self.layer, name)
        if isinstance(stored, ParametrizationList):
            _replace_originals(stored, values, f"{type(self.layer).__name__}.{name}")
        elif stored is None:
            raise MergeError(
                f"{name} of this {type(self.layer).__name__} is not a parameter: torch.nn.utils.weight_norm or a "
                "similar hook computes it before each forward. Call remove_weight_norm before get_peft_model, or keep "
                "the adapter unmerged"
            )
        elif stored.is_meta and (hook := offload_hook(self.layer)) is not None:
            replace_offloaded(self.layer, hook, name, values)
        else:
            self.layer._parameters[name] = nn.Parameter(values.contiguous(), requires_grad=False)

    def state(self) -> dict[str, Any]:
        """Return references to the parameters that `write` and `write_bias` replace, by name.

        Nothing is copied, and `restore` of this value is exact to the bit. Of an offloaded layer, the values are read.
        """
        state: dict[str, Any] = {}
        hook = offload_hook(self.layer)
        for name in ("weight", "bias"):
            stored = _stored_parameter(self.layer, name)
            if isinstance(stored, ParametrizationList):
                state[name] = dict(stored._parameters)
            elif name in self.layer._parameters:
                is_offloaded = hook is not None and stored is not None and stored.is_meta
                state[name] = offloaded_tensor(hook, name) if is_offloaded else stored
        return state

    def move_state(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Move the tensors of a state that are not parameters to the device of its weight."""

    def restore(self, state: dict[str, Any]) -> None:
        """Put the parameters of a state back into the layer."""
        hook = offload_hook(self.layer)
        for name, value in state.items():
            if isinstance(value, dict):
                self.layer.parametrizations[name]._parameters.update(value)
            elif hook is not None and value is not None and self.layer._parameters[name].is_meta:
                replace_offloaded(self.layer, hook, name, value)
            else:
                self.layer._parameters[name] = value

    def per_output(self, values: Tensor) -> Tensor:
        """Reshape values (o,) so that they broadcast over the feature axis of the layer's output."""
        kernel = self.kernel
        return values.view(-1, *(1 for _ in kernel)) if kernel else values

    # -- mathematics ---------------------------------------------------------------------------------------------

    @abstractmethod
    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return the layer's output for another weight and without bias.

        Args:
            x: The layer's input.
            weight: A dense weight in canonical orientation.

        Returns:
            The output in x's floating-point dtype; in the weight's dtype for an embedding.
        """

    @abstractmethod
    def pointwise(self, h: Tensor, weight: Tensor) -> Tensor:
        """Return a linear map of the feature axis of `h`.

        Args:
            h: A tensor with r features, laid out like an output of `apply`.
            weight: The map (o, r); (o, r/groups, 1, ...) for a convolution.

        Returns:
            A tensor like `h` with o features.
        """

    def compute_dtype(self, x: Tensor) -> torch.dtype | None:
        """Return the dtype in which the layer computes its output, if that output is exactly x Wᵀ + b.

        Then `product` gives the layer's output, and `peftcore.kernels.low_rank` may compute in place of the layer.

        Args:
            x: The layer's input (..., i).

        Returns:
            The dtype; None if weight or bias is trainable, if the layer's class computes more than x Wᵀ + b, or if it
            rounds x.
        """
        return None

    @property
    def product_takes_any_dtype(self) -> bool:
        """True if `product` computes in the dtype of x, whatever dtype the layer has."""
        return False

    def product(self, x: Tensor) -> Tensor:
        """Return x Wᵀ + b (..., o) in newly allocated memory and without gradient.

        Args:
            x: The input (..., i), of the dtype that `compute_dtype` returned.
        """
        raise NotImplementedError(f"{type(self).__name__} has no product")

    def plain_output(self, x: Tensor) -> Tensor | None:
        """Return the layer's output if that is exactly x Wᵀ + b (..., o); for use without gradients.

        Args:
            x: The layer's input (..., i).

        Returns:
            The output in newly allocated memory; None if the layer's forward must compute it.
        """
        return self.product(x) if self.compute_dtype(x) == x.dtype else None

    def prefers_product(self, x: Tensor) -> bool:
        """Return True if `product` is a faster way to the layer's output than its own forward.

        Args:
            x: The layer's input (..., i).
        """
        return False

    def weight_for_backward(self) -> Tensor | None:
        """Return the tensor that autograd saves to compute the gradient of x.

        Returns:
            The layer's weight (o, i); None for a quantised layer, whose weight is dequantised again in the backward.
        """
        return self.read()

    @abstractmethod
    def add_pointwise(self, y: Tensor, h: Tensor, weight: Tensor) -> Tensor:
        """Return y + pointwise(h, weight) in y's dtype, in one pass over y if the layer allows it."""


def _stored_parameter(layer: nn.Module, name: str) -> nn.Parameter | ParametrizationList | None:
    """Return a layer's parameter or its parametrisation; None if `name` is a tensor but not a parameter."""
    if (parametrizations := layer._modules.get("parametrizations")) is not None and name in parametrizations._modules:
        return parametrizations._modules[name]  # type: ignore[return-value]
    return layer._parameters.get(name)


@torch.no_grad()
def _replace_originals(parametrization: ParametrizationList, values: Tensor, name: str) -> None:
    """Give a parametrised tensor new values by replacing its originals.

    Raises:
        MergeError: The parametrisation has no right inverse for these values.
    """
    steps = ", ".join(type(step).__name__ for step in parametrization)
    error = MergeError(
        f"the parametrisation {steps} of {name} cannot hold the merged values; call "
        "torch.nn.utils.parametrize.remove_parametrizations before get_peft_model, or keep the adapter unmerged"
    )
    before, originals = dict(parametrization._parameters), values
    for step in reversed(list(copy.deepcopy(parametrization))):  # some right inverses change the step itself
        if not hasattr(step, "right_inverse"):
            raise error
        try:
            originals = step.right_inverse(originals)  # type: ignore[operator]
        except ValueError as reason:  # for example: the matrix is not orthogonal
            raise error from reason
    tensors = [originals] if parametrization.is_tensor else list(originals)
    names = ["original"] if parametrization.is_tensor else [f"original{number}" for number in range(len(tensors))]
    for key, tensor in zip(names, tensors, strict=True):
        parametrization._parameters[key] = nn.Parameter(tensor.clone(), requires_grad=False)
    precision = torch.finfo(values.dtype).eps
    tolerance = 16 * precision * float(values.abs().max())
    if not torch.allclose(parametrization(), values, rtol=16 * precision, atol=tolerance):
        parametrization._parameters.update(before)
        raise error
