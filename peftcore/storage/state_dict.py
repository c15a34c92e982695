"""State dicts of an adapter and of the base under the keys of HF PEFT and of the plain model.

A saved adapter's key is `base_model.model.` + the module's path + the parameter, without the adapter's name. The keys
of a `PeftModel` begin with that prefix; those of a model whose class is unchanged (`inject_adapter_in_model`) do not.
"""

import contextlib
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.errors import MergeError, SizeMismatchError
from peftcore.files.tensors import PREFIX, is_sharded, whole
from peftcore.injection.adapter_set import AdapterSet, adapter_set
from peftcore.layers.wrapper import LayerWrapper, Prompts
from peftcore.storage.adapter_state import SHARED_PREFIX, AdapterState, adapter_state_of
from peftcore.storage.checkpoint import adapter_tensors, adapter_values
from peftcore.storage.embedding_rows import SaveEmbeddings
from peftcore.storage.reading import IncompatibleKeys


def has_prefix(model: nn.Module) -> bool:
    """Return True if the keys of the model's adapters begin with `base_model.`, as those of a `PeftModel`."""
    return hasattr(model, "merge_and_unload")


def get_peft_model_state_dict(
    model: Any,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: SaveEmbeddings = "auto",
) -> dict[str, Tensor]:
    """Return the tensors of one adapter, without the parameters of the base.

    Args:
        model: a model with adapters, or FSDP version 1 around one. Then every process has to call this function.
        state_dict: a state dict of the model to take the values from; None for the model's own parameters.
        adapter_name: the adapter.
        unwrap_compiled: True if the model is the result of `torch.compile`.
        save_embedding_layers: whether to return the base's embeddings, too; see `PeftModel.save_pretrained`.

    Returns:
        {HF PEFT's key without the adapter's name: tensor}.

    Raises:
        AdapterNameError: the adapter is not loaded.
        CheckpointError: `state_dict` lacks parameters of the adapter.
    """
    model = getattr(model, "_orig_mod", model) if unwrap_compiled else model
    with _gathered(model, writes=False) as plain:
        adapter_set(plain).require(adapter_name)
        if state_dict is None:
            tensors = adapter_tensors(plain, adapter_name, save_embedding_layers)
        else:
            tensors = adapter_values(plain, adapter_name, save_embedding_layers, state_dict)
        if plain is not model:
            tensors = {key: tensor.detach().clone() for key, tensor in tensors.items()}
    tensors = {key: whole(tensor) if is_sharded(tensor) else tensor for key, tensor in tensors.items()}
    return tensors if has_prefix(plain) else {key.removeprefix(PREFIX): t for key, t in tensors.items()}


@contextlib.contextmanager
def _gathered(model: Any, writes: bool) -> Iterator[Any]:
    """Yield the model inside of FSDP version 1 with whole parameters; every process has to enter the context.

    Other models are yielded as they are.

    Args:
        model: the model, wrapped or not.
        writes: True keeps what is written into the parameters.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")  # it cannot wrap a model before it is imported
    if fsdp is None or not isinstance(model, fsdp.FullyShardedDataParallel):
        yield model
        return
    with fsdp.FullyShardedDataParallel.summon_full_params(model, writeback=writes):
        yield model.module


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> IncompatibleKeys:
    """Write tensors into an adapter that is in the model; the adapter keeps what the state dict lacks.

    As in HF PEFT, tensors of the base (trained biases of an adapter whose configuration has `bias="none"`, embeddings)
    are written into the base, for all adapters. A warning names those that change.

    Args:
        model: a model with adapters, or FSDP version 1 around one. Then every process has to call this function.
        peft_model_state_dict: {HF PEFT's key without the adapter's name: tensor}, with or without the prefix
            `base_model.model.`.
        adapter_name: the adapter.
        ignore_mismatched_sizes: True skips tensors of another shape, with a warning.
        low_cpu_mem_usage: True if the adapter's parameters are on the meta device: they get the tensors' memory and the
            device of their layer.

    Returns:
        The keys that the state dict lacks, with the adapter's name in them, and those that the adapter does not have.

    Raises:
        TypeError: the second argument is no mapping.
        AdapterNameError: the adapter is not loaded.
        SizeMismatchError: a tensor has another shape, and `ignore_mismatched_sizes` is False.
        MergeError: a tensor of the base changes, and adapters are merged into it.
    """
    if not isinstance(peft_model_state_dict, Mapping):
        raise TypeError(
            "set_peft_model_state_dict takes {key: tensor}, such as get_peft_model_state_dict(model) returns; got "
            f"{peft_model_state_dict!r:.200}"
        )
    with _gathered(model, writes=True) as plain:
        return _write(plain, peft_model_state_dict, adapter_name, ignore_mismatched_sizes, low_cpu_mem_usage)


def _write(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str,
    ignore_mismatched_sizes: bool,
    low_cpu_mem_usage: bool,
) -> IncompatibleKeys:
    """Write tensors into an adapter; see `set_peft_model_state_dict`."""
    adapters = adapter_set(model)
    adapters.require(adapter_name)
    state = adapter_state_of(adapters, adapter_name)
    if low_cpu_mem_usage:
        _leave_meta_device(adapters, adapter_name)
        state = adapter_state_of(adapters, adapter_name)
    state_tensors = {with_prefix(key, state): tensor for key, tensor in peft_model_state_dict.items()}
    state_tensors = dict(state.with_our_keys(state_tensors))
    present = state.tensors()
    of_base = _of_base(model, state_tensors.keys() - present.keys() - state.repeated())
    unexpected = sorted(state_tensors.keys() - present.keys() - state.repeated() - of_base.keys())
    here = present | of_base
    known = {key: tensor for key, tensor in state_tensors.items() if key in here}
    wrong = {
        key: tensor for key, tensor in known.items() if tensor.shape != here[key].shape and not state.fits(key, tensor)
    }
    if wrong:
        listed = ", ".join(f"{key} is {list(t.shape)}, here {list(here[key].shape)}" for key, t in wrong.items())
        if not ignore_mismatched_sizes:
            raise SizeMismatchError(
                f"set_peft_model_state_dict: size mismatch: {listed:.1000}; the adapter in the model has another "
                "configuration, or another base (ignore_mismatched_sizes=True skips these tensors)"
            )
        warnings.warn(f"tensors of another shape are skipped: {listed:.1000}", stacklevel=3)
    _write_base(adapters, {key: (tensor, known[key]) for key, tensor in of_base.items() if key not in wrong})
    matching = {key: tensor for key, tensor in known.items() if key in present and key not in wrong}
    with torch.no_grad():
        values = {key: tensor.clone() for key, tensor in present.items()} | matching
        if state.prompt is not None:
            state.prompt.read(values, {}, any(p.requires_grad for p in state.prompt.parameters()))
        state.read(values)
    missing = sorted(present.keys() - matching.keys() - state.optional())
    named = [state.parameter_name(key, adapter_name) for key in missing]
    keep = has_prefix(model)
    return IncompatibleKeys(
        named if keep else [key.removeprefix(PREFIX) for key in named],
        unexpected if keep else [key.removeprefix(PREFIX) for key in unexpected],
    )


def _of_base(model: nn.Module, keys: Iterable[str]) -> dict[str, Tensor]:
    """Return {PEFT's key: tensor of the base} of those keys that name one."""
    tensors = model.state_dict(keep_vars=True)
    of_base = {key: tensors[ours] for key, ours in _base_tensors(model) if ours in tensors}
    plain = {key: key.removeprefix(PREFIX).replace("base_layer.", "") for key in keys}
    return {key: of_base[name] for key, name in plain.items() if name in of_base}


def _write_base(adapters: AdapterSet, values: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Write {key: (tensor of the base, its new value)}, and warn of those that change.

    Raises:
        MergeError: a value changes while adapters are merged into the base.
    """
    changed = {key: (tensor, value) for key, (tensor, value) in values.items() if not _equal(tensor, value)}
    if not changed:
        return
    if adapters.merged:
        raise MergeError(
            f"set_peft_model_state_dict: {list(changed)[:3]} belong to the base, and {list(adapters.merged)} are "
            "merged into it; call unmerge_adapter first"
        )
    warnings.warn(f"tensors of the base are changed, for all adapters: {list(changed)[:5]}", stacklevel=4)
    with torch.no_grad():
        for tensor, value in changed.values():
            tensor.copy_(value)
    adapters.selection.forget()


def _equal(tensor: Tensor, value: Tensor) -> bool:
    """Return True if a value that is written into a tensor leaves it as it is."""
    return torch.equal(tensor.detach(), value.to(tensor))


def with_prefix(key: str, state: AdapterState) -> str:
    is_prompt = state.prompt is not None
    return key if is_prompt or key.startswith(SHARED_PREFIX) else f"{PREFIX}{key}"


def _leave_meta_device(adapters: AdapterSet, name: str) -> None:
    """Give parameters on the meta device memory on the device of their layer; their values are not set."""
    for adapter in adapters.adapters(name).values():
        if any(parameter.is_meta for parameter in adapter.parameters()):
            adapter.to_empty(device=adapter.base.device)
    for path, module in adapters.copies(name).items():
        if any(parameter.is_meta for parameter in module.parameters()):
            module.to_empty(device=next(adapters.saved[path].base_layer.parameters()).device)


# -- the base model ---------------------------------------------------------------------------------------------------


def _base_tensors(module: nn.Module, prefix: str = "", path: str = "") -> Iterator[tuple[str, str]]:
    """Yield (key in the plain model, key in the model with adapters) of the tensors of the base."""
    while isinstance(module, LayerWrapper):
        module, path = module.base_layer, f"{path}base_layer."
    names = [*module._parameters, *(n for n in module._buffers if n not in module._non_persistent_buffers_set)]
    for name in names:
        if getattr(module, name) is not None:
            yield f"{prefix}{name}", f"{path}{name}"
    for name, child in module._modules.items():
        if child is not None and not isinstance(child, Prompts):
            yield from _base_tensors(child, f"{prefix}{name}.", f"{path}{name}.")


def get_base_model_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of the base under the keys of the plain model.

    Merged adapters are in the values.

    Args:
        model: a model with adapters.
    """
    tensors = model.state_dict()
    return {key: tensors[ours] for key, ours in _base_tensors(model) if ours in tensors}


def set_base_model_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True
) -> IncompatibleKeys:
    """Load a state dict of the plain model into the base of a model with adapters.

    Args:
        model: a model with adapters.
        state_dict: {key of the plain model: tensor}.
        strict: True makes missing and unexpected keys an error.

    Returns:
        The missing and the unexpected keys.

    Raises:
        RuntimeError: with `strict`, keys are missing or unexpected; or a tensor has another shape.
        MergeError: adapters are merged into the base; or a tensor changes that adapters have replaced (LoftQ, KaSA, or
            embeddings that were saved with an adapter). Nothing is loaded then.
    """
    adapters = adapter_set(model)
    if adapters.merged:
        raise MergeError(
            f"set_base_model_state_dict: {list(adapters.merged)} are merged into the base, and unmerging them would "
            "restore the old values; call unmerge_adapter first"
        )
    tensors = model.state_dict()
    ours = {key: own for key, own in _base_tensors(model) if own in tensors}
    missing = [key for key in ours if key not in state_dict]
    unexpected = [key for key in state_dict if key not in ours]
    if strict and (missing or unexpected):
        parts = (("Missing", missing), ("Unexpected", unexpected))
        listed = "; ".join(f"{word} keys: {keys[:5]} ({len(keys)} in all)" for word, keys in parts if keys)
        raise RuntimeError(f"set_base_model_state_dict: {listed}; strict=False loads the others")
    replaced = {f"{path}.weight" for path, slot in adapters.layers.items() if slot.has_replaced_base}
    replaced |= adapters.replaced_rows.keys()
    known = replaced & ours.keys() & state_dict.keys()
    if lost := sorted(key for key in known if not _equal(tensors[ours[key]], state_dict[key])):
        raise MergeError(
            f"set_base_model_state_dict: adapters have replaced {lost[:3]}, and deleting them would restore the old "
            "values; load the base before these adapters, or leave the keys out with strict=False"
        )
    model.load_state_dict({ours[key]: tensor for key, tensor in state_dict.items() if key in ours}, strict=False)
    adapters.selection.forget()
    return IncompatibleKeys(missing, unexpected)


__all__ = [
    "get_base_model_state_dict",
    "get_peft_model_state_dict",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
]
