"""Alternative parameters that need less memory, and the peak of each."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from flows.errors import EstimateError
from flows.params import Params
from flows.paths import Paths
from flows.resources.batches import workload
from flows.resources.static_memory import StaticMemory


@dataclass(frozen=True)
class Change:
    """Alternative parameters, and the peak of training with them (bytes); `mapped` as in Estimate."""

    params: dict[str, Any]
    peak: int
    mapped: int
    fits: bool


@dataclass(frozen=True)
class Alternative:
    """Alternative parameters, and their memory without libraries."""

    params: dict[str, Any]
    memory: StaticMemory


def alternatives(config: Any, params: Params, paths: Paths, counted: StaticMemory) -> list[Alternative]:
    """Return alternative parameters that may need less memory.

    Args:
        config: The base's configuration.
        params: The parameters of the run.
        paths: The project's files.
        counted: Memory of the run with the present parameters.
    """
    possible: list[Alternative] = []
    for values in _choices(params):
        changed = _with(params, values)
        same = counted.sizes if changed.quantization == params.quantization else None
        try:
            possible.append(Alternative(values, StaticMemory(config, changed, workload(changed, paths), same)))
        except EstimateError:  # such as packs shorter than a row
            continue
    return possible


def changes(possible: Iterable[Alternative], libraries: int, rest: int, limit: int) -> list[Change]:
    """Return the peak of each alternative, the smallest saving first.

    Args:
        possible: The alternatives.
        libraries: Bytes of libraries before loading.
        rest: Bytes of libraries and allocator during training, assumed constant.
        limit: Bytes of the machine.
    """
    found = []
    for one in possible:
        peak, mapped = max(libraries + one.memory.loading, one.memory.peak + rest), one.memory.sizes.mapped
        found.append(Change(one.params, peak, mapped, peak - mapped <= limit))
    return sorted(found, key=lambda change: -change.peak)


def _choices(params: Params) -> list[dict[str, Any]]:
    train, chosen = params.train, list[dict[str, Any]]()
    if train.gradient_checkpointing == "none":
        chosen.append({"train.gradient_checkpointing": "selective"})
    if train.gradient_checkpointing in ("none", "selective"):
        chosen.append({"train.gradient_checkpointing": "blocks"})
    smaller: dict[str, Any] = {}
    if train.batching == "packed":
        smaller = {
            "train.pack_tokens": train.pack_tokens // 2,
            "train.gradient_accumulation": 2 * train.gradient_accumulation,
        }
    elif train.batch_size > 1:
        smaller = {
            "train.batch_size": train.batch_size // 2,
            "train.gradient_accumulation": 2 * train.gradient_accumulation,
        }
    stored = {"quantization.storage": "nf4"} if params.quantization.storage in ("none", "int8", "torchao_int8") else {}
    chosen += [one for one in (smaller, stored) if one]
    recomputes = train.gradient_checkpointing in ("blocks", "offload")
    least = {} if recomputes else {"train.gradient_checkpointing": "blocks"}
    if train.batching != "packed" and train.batch_size > 1:
        smaller = {"train.batch_size": 1, "train.gradient_accumulation": train.batch_size * train.gradient_accumulation}
    everything = {**least, **smaller, **stored}
    return [*chosen, everything] if everything and everything not in chosen else chosen


def _with(params: Params, values: dict[str, Any]) -> Params:
    sections = params.model_dump()
    for key, value in values.items():
        section, _, name = key.partition(".")
        sections[section][name] = value
    return Params.model_validate(sections)
