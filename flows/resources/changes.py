"""Other choices in params.yaml that take less memory, and the peak with each."""

from dataclasses import dataclass
from typing import Any

from flows.errors import PlanError
from flows.params import Params
from flows.paths import Paths
from flows.resources.batches import workload
from flows.resources.counted import Counted


@dataclass(frozen=True)
class Change:
    """Other parameters, and the peak that training then has (bytes); `mapped` as in Plan."""

    params: dict[str, Any]
    peak: int
    mapped: int
    fits: bool


def changes(
    config: Any, params: Params, paths: Paths, counted: Counted, libraries: int, rest: int, limit: int
) -> list[Change]:
    """Choices that take less, the one that saves least first.

    counted: with the parameters as they are. libraries, rest, limit: bytes of libraries before anything is loaded, of
    libraries and allocator while training, which are taken to stay as they are, and of the machine.
    """
    found: list[Change] = []
    for given in _choices(params):
        changed = _with(params, given)
        same = counted.sizes if changed.quantization == params.quantization else None
        try:
            other = Counted(config, changed, workload(changed, paths), same)
        except PlanError:  # such as packs that are shorter than a row
            continue
        peak, mapped = max(libraries + other.loading, other.peak + rest), other.sizes.mapped
        found.append(Change(given, peak, mapped, peak - mapped <= limit))
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
    stored = {"quantization.storage": "nf4"} if params.quantization.storage in ("none", "int8") else {}
    chosen += [one for one in (smaller, stored) if one]
    least = {"train.gradient_checkpointing": "blocks"} if train.gradient_checkpointing != "offload" else {}
    if train.batching != "packed" and train.batch_size > 1:
        smaller = {"train.batch_size": 1, "train.gradient_accumulation": train.batch_size * train.gradient_accumulation}
    everything = {**least, **smaller, **stored}
    return [*chosen, everything] if everything and everything not in chosen else chosen


def _with(params: Params, given: dict[str, Any]) -> Params:
    sections = params.model_dump()
    for key, value in given.items():
        section, _, name = key.partition(".")
        sections[section][name] = value
    return Params.model_validate(sections)
