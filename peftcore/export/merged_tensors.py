"""The tensors of a merged model's files: headers are known from the start, values are computed while writing."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftcore.adapter import Adapter
from peftcore.errors import MergeError
from peftcore.export.mapped_model import key_of
from peftcore.export.safetensors_stream import Header
from peftcore.injection.adapter_set import AdapterSet
from peftcore.layers.adapter_slot import with_trained_biases


class Output(NamedTuple):
    """One tensor to write."""

    header: Header
    compute: Callable[[], Tensor]


def merged_tensors(
    model: Any, adapters: AdapterSet, name: str, tensors: dict[str, Tensor], dtype: torch.dtype | None
) -> dict[str, Output]:
    """Return {key: tensor to write} of a mapped model with one adapter merged, rounded to `dtype` if it is not None.

    The result has the keys of the base's `tensors`, plus those of all tied weights if the merge changes one of them
    and not the others: the option `tie_word_embeddings` is one for all.
    """
    still_tied = _still_tied(adapters, name)
    changes = {path: change for path, change in _changes(adapters, name, dtype).items() if path not in still_tied}
    outputs = {key: _unchanged(tensor, dtype) for key, tensor in tensors.items()}
    tied = model.all_tied_weights_keys
    unties = any({*pair} & changes.keys() and not {*pair} & still_tied for pair in tied.items())
    added = {target: key_of(source, model, tensors) for target, source in tied.items() if target not in tensors}
    added = {target: key for target, key in added.items() if key is not None and unties}
    outputs |= {target: outputs[key] for target, key in added.items()}
    for path, compute in changes.items():
        key = path if path in outputs else key_of(path, model, tensors)
        assert key is not None
        outputs[key] = Output(outputs[key].header, lambda key=key, compute=compute: _finite(key, compute()))
    return outputs | {target: outputs[key] for target, key in added.items() if target in still_tied}


def _unchanged(tensor: Tensor, dtype: torch.dtype | None) -> Output:
    target = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    return Output(Header(target, tuple(tensor.shape)), lambda: tensor.to(target))


def _still_tied(adapters: AdapterSet, name: str) -> set[str]:
    """Return the paths of shared weights that the adapter changes in the same way as at another layer before."""
    first: dict[int, Adapter] = {}
    found = set()
    for path, site in adapters.layers.items():
        weight = site.base.state().get("weight")
        if weight is not None:
            other = first.setdefault(id(weight), site.adapters[name])
            if other is not site.adapters[name] and site.adapters[name].changes_like(other):
                found.add(f"{path}.weight")
    return found


def _changes(adapters: AdapterSet, name: str, dtype: torch.dtype | None) -> dict[str, Callable[[], Tensor]]:
    """Return {path: function that computes the merged parameter} of every parameter that the adapter changes."""
    changes: dict[str, Callable[[], Tensor]] = {}
    for path, (layer, leaf, _) in adapters.replaced_rows.items():
        parameter = layer._parameters[leaf]
        assert parameter is not None
        changes[path] = lambda parameter=parameter: parameter.detach().to(dtype or parameter.dtype)
    for path, site in adapters.layers.items():
        adapter, base = site.adapters[name], site.base
        weight = path if base.kind == "parameter" else f"{path}.weight"
        if adapter.changes_weight:
            changes[weight] = lambda adapter=adapter: _merged(adapter, dtype)
        if base.bias is not None and _merged_bias(adapter) is not base.bias:
            changes[f"{path}.bias"] = lambda adapter=adapter, bias=base.bias: _merged_bias(adapter).to(
                dtype or bias.dtype
            )
    for path, copy in adapters.copies(name).items():
        for key, tensor in copy.state_dict().items():
            changes[f"{path}.{key}"] = lambda tensor=tensor: tensor.to(dtype or tensor.dtype)
    return changes


def _merged(adapter: Adapter, dtype: torch.dtype | None) -> Tensor:
    """Return the merged weight in the layer's storage layout and in `dtype`; the layer itself is not changed."""
    base, before = adapter.base, adapter.base.state()
    leaf = getattr(base, "leaf", "weight")
    weight = base.read()
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    weight = adapter.merged_weight(weight)
    placeholder = torch.zeros((), dtype=dtype or before[leaf].dtype).expand(before[leaf].shape)
    base.restore({leaf: nn.Parameter(placeholder, requires_grad=False)})  # `write` keeps the type of this parameter
    try:
        base.write(weight)
        return base.state()[leaf]
    finally:
        base.restore(before)


def _merged_bias(adapter: Adapter) -> Tensor:
    bias = adapter.base.bias
    for part in with_trained_biases([adapter]):
        bias = part.merged_bias(bias)
    assert bias is not None
    return bias


def _finite(key: str, tensor: Tensor) -> Tensor:
    if not tensor.isfinite().all():
        raise MergeError(
            f"the merged {key} has NaN or infinite values in {tensor.dtype}, so nothing was written; check the adapter"
        )
    return tensor
