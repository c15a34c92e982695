"""Folding adapters into base weights and taking them out again, exact to the bit.

The base's own parameters are set aside while a merged one stands in their place, so unmerging puts back the very
tensors; the price is one more copy of each merged weight in memory until then. `merge_and_unload` keeps none.
"""

import contextlib
import logging
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from peftcore.adapter_set import AdapterSet, adapter_set
from peftcore.errors import MergeError
from peftcore.host import Site
from peftcore.inject import remove_hosts

logger = logging.getLogger(__name__)


def merged_names(model: nn.Module) -> list[str]:
    """Adapters that are merged now, in the order in which they were."""
    hosts = adapter_set(model).layers.values()
    return list(dict.fromkeys(name for host in hosts for name in host.merged))


@torch.no_grad()
def merge_adapter(model: nn.Module, adapter_names: str | list[str] | None = None, safe_merge: bool = False) -> None:
    """Fold adapters into their base weights, in place; the other active ones go on acting.

    adapter_names: in order; None means the active ones.
    safe_merge: check each merged weight for NaN/Inf before writing any.
    Raises MergeError if a layer cannot be merged or a merged weight is not finite; nothing is then changed.
    """
    adapters = adapter_set(model)
    chosen = adapters.selection.active if adapter_names is None else adapter_names
    names = [chosen] if isinstance(chosen, str) else list(chosen)
    adapters.require(*names)
    _check_mergeable(adapters, names, check_values=safe_merge)
    for host in adapters.layers.values():
        if new := _not_merged_yet(host, names):
            _merge_into(host, new)


def check_mergeable(model: nn.Module, adapter_names: list[str]) -> None:
    """Raise MergeError if an adapter cannot be merged, without computing any weight."""
    _check_mergeable(adapter_set(model), adapter_names, check_values=False)


def _check_mergeable(adapters: AdapterSet, names: list[str], check_values: bool) -> None:
    if prompts := [name for name in names if name in adapters.prompts]:
        raise MergeError(
            f"{prompts} are prompts, which no weight can hold; nothing was merged: name the others in adapter_names"
        )
    for path, host in adapters.layers.items():
        new = _not_merged_yet(host, names)
        for name in new:
            try:
                host.adapters[name].check_mergeable()
                host.adapters[name].merged_bias(host.base.bias)
            except MergeError as error:
                raise MergeError(f"{path}: {error}") from error
        if check_values and new and not _stays_finite(host, new):
            prefixes = (new[: count + 1] for count in range(len(new)))
            name = next(prefix[-1] for prefix in prefixes if not _stays_finite(host, prefix))
            raise MergeError(
                f"merging {name!r} into {path} gives NaN or Inf in {host.base.dtype}, so nothing was merged; if the "
                "adapter is broken, train it again at a lower learning rate or load an earlier checkpoint"
            )


def _not_merged_yet(host: Site, names: list[str]) -> list[str]:
    return [name for name in names if name in host.adapters and name not in host.merged]


def _stays_finite(host: Site, names: list[str]) -> bool:
    """Whether what a merge would write is finite in the type that the base keeps: float16 ends at 65504."""
    weight, bias = _merged(host, names)
    finite = bool(weight.to(host.base.dtype).isfinite().all())
    return finite and (bias is None or bool(bias.to(host.base.bias).isfinite().all()))


def _merged(host: Site, names: list[str]) -> tuple[Tensor, Tensor | None]:
    base = host.base
    weight = base.read()
    wide = torch.promote_types(weight.dtype, torch.float32)  # half precision would round after every adapter
    weight, bias = weight.to(wide), base.bias
    for name in names:
        weight, bias = host.adapters[name].merged_weight(weight), host.adapters[name].merged_bias(bias)
    return weight, bias


def _merge_into(host: Site, names: list[str]) -> None:
    base = host.base
    weight, bias = _merged(host, names)
    if host.unmerged_state is None:
        host.unmerged_state = base.state()
    base.write(weight)
    if bias is not None and bias is not base.bias:
        base.write_bias(bias)
    host.merged += tuple(names)


def unmerge_adapter(model: nn.Module) -> None:
    """Put the base's own weights back, bit for bit; the adapters act again."""
    for host in adapter_set(model).layers.values():
        if host.unmerged_state is not None:
            host.base.restore(host.unmerged_state)
            host.unmerged_state, host.merged = None, ()


@contextlib.contextmanager
def original_weights(model: nn.Module) -> Iterator[None]:
    """The unmerged weights in place while inside, the merged ones again after."""
    hosts = [host for host in adapter_set(model).layers.values() if host.unmerged_state is not None]
    merged = [host.base.state() for host in hosts]
    for host in hosts:
        assert host.unmerged_state is not None
        host.base.restore(host.unmerged_state)
    try:
        yield
    finally:
        for host, state in zip(hosts, merged, strict=True):
            host.base.restore(state)


def merge_and_unload(model: nn.Module, safe_merge: bool = False, adapter_names: list[str] | None = None) -> nn.Module:
    """Fold adapters in for good and take the hosts out: the plain model remains, and no copy of the old weights.

    Modules that the active adapter trained whole take the originals' place. Raises MergeError as `merge_adapter`.
    """
    merge_adapter(model, adapter_names, safe_merge)
    if adapter_names is not None:
        adapter_set(model).selection.active = tuple(adapter_names)
    for host in adapter_set(model).layers.values():
        host.unmerged_state = None
    remove_hosts(model, keep_trained=True)
    _note_untied_embeddings(model)
    return model


def unload(model: nn.Module) -> nn.Module:
    """Take the adapters out and leave the base exactly as it was before the first one."""
    unmerge_adapter(model)
    remove_hosts(model, keep_trained=False)
    return model


def _note_untied_embeddings(model: nn.Module) -> None:
    """A merge into one side of a tied pair leaves two weights; the configuration must say so, or loading ties them."""
    config = getattr(model, "config", None)
    if config is None or not getattr(config, "tie_word_embeddings", False):
        return
    pair = (getattr(model, name, lambda: None)() for name in ("get_input_embeddings", "get_output_embeddings"))
    source, head = (getattr(module, "weight", None) for module in pair)
    if source is not None and head is not None and source is not head:
        config.tie_word_embeddings = False
        logger.info("embeddings and output head are two weights after the merge: tie_word_embeddings is now False")
