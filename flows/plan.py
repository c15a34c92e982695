"""`peftcore plan`: how much memory, time and disk a run will take, and what would make it fit, before it is started.

memory   what is kept whatever the batch (`plan_sizes`, on the meta device), what a step adds (`plan_activations`,
         on fake tensors), and what libraries and the allocator add: measured by the probe (`plan_probe`), which
         trains two shallow models of the real widths, or else what this process itself takes
time     the probe's, for all blocks and every batch of the run; none without it
disk     what the stages will write
"""

import shutil
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flows.base_model import device
from flows.errors import BaseModelError, PlanError
from flows.machine_memory import free_memory, memory_limit, peak_memory
from flows.params import Params
from flows.paths import Paths
from flows.plan_activations import Activations, activations
from flows.plan_batches import Workload, workload
from flows.plan_probe import Measured, Task, depths, run_probe, seconds_of, sequence, write_shallow_base
from flows.plan_sizes import Sizes, base_on_meta, number_of_blocks, sizes, with_blocks
from flows.stages.detect import without_weights

PROBE_SECONDS = 600.0
"""How long one of the probe's processes may take."""
SMALL = 2**20
"""Bytes of a checkpoint that are not tensors: states, configurations, the manifest."""


@dataclass(frozen=True)
class Change:
    """Other parameters, and the peak that training then has (bytes); `mapped` as in Plan."""

    params: dict[str, Any]
    peak: int
    mapped: int
    fits: bool


@dataclass(frozen=True)
class Plan:
    """Memory and disk in bytes, time in seconds."""

    model: str
    blocks: int
    batch: tuple[int, int]
    """(rows, tokens) of the batch that needs most memory."""
    optimizer_steps: int
    trainable: int
    """Trained weights (count)."""
    memory: dict[str, int]
    """What the training step holds at its worst, by kind."""
    peak: int
    """The most that the train stage holds."""
    loading_peak: int
    """The most that it holds while the base is loaded."""
    mapped: int
    """What of the peak is the base's file, which the system takes out of memory when it needs the room."""
    limit: int
    """What the machine has for one process."""
    free: int
    """What of it nobody holds now."""
    device: str
    time: dict[str, float]
    """Of the train stage, by kind; empty without the probe."""
    disk: dict[str, int]
    disk_free: int
    changes: list[Change] = field(default_factory=list)
    """What else could be chosen, the one that saves least first."""
    notes: list[str] = field(default_factory=list)
    """How the figures came about where that is not the usual way."""

    @property
    def seconds(self) -> float:
        return sum(self.time.values())

    @property
    def seconds_per_step(self) -> float:
        return (self.time["forward and backward"] + self.time["optimiser"]) / self.optimizer_steps

    @property
    def fits(self) -> bool:
        return self.peak - self.mapped <= self.limit and sum(self.disk.values()) <= self.disk_free

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        per_step = {"seconds_per_step": self.seconds_per_step, "seconds": self.seconds} if self.time else {}
        return {**asdict(self), **per_step, "fits": self.fits}

    def refusal(self) -> str:
        """Why the run will not fit, and what would."""
        if self.peak - self.mapped > self.limit:
            said = f"training needs {gib(self.peak - self.mapped)} at its peak, and this {self.device} has {gib(self.limit)}"
            helps = next((change for change in self.changes if change.fits), None)
            if helps is None:
                return f"{said}; nothing in params.yaml makes it fit: take a smaller base, or a larger machine"
            return f"{said}; it fits, with {gib(helps.peak - helps.mapped)}, with {worded(helps.params)}"
        needed = sum(self.disk.values())
        return f"the run needs {gib(needed)} of disk, and {gib(self.disk_free)} are free; free some space"


def plan(
    params: Params, paths: Paths, config_file: Path | None = None, probe: bool = True, timeout: float = PROBE_SECONDS
) -> Plan:
    """Plan the train stage of a run.

    config_file: a config.json, of a model that need not be here; None: the fetched base's. probe: measure two shallow
    models; otherwise only count. timeout: seconds for each of them. Raises PlanError or BaseModelError.
    """
    if params.train.objective != "sft":
        raise PlanError(f"train.objective is {params.train.objective}; only sft can be planned")
    config = _config(config_file or paths.base)
    work = workload(params, paths)
    counted = _Counted(config, params, work)
    notes = [] if work.prepared else ["no prepared rows: each is taken to be data.max_length tokens, all supervised"]
    if not _even(config, params, counted.sizes):
        notes.append("the blocks differ from one another, and figures are those of the first ones carried on")
    libraries = peak_memory(device()) if device().type == "cpu" else 0
    measured = _measured(config, params, work, timeout) if probe else None
    if measured is None:
        notes.append("without the probe: libraries as in this process, no time, an allocator that wastes nothing")
    loading = libraries + counted.loading
    step = round(measured.peak) if measured else libraries + counted.peak
    rest = step - counted.peak
    limit = memory_limit(device())
    return Plan(
        model=config.architectures[0] if config.architectures else config.model_type,
        blocks=number_of_blocks(config),
        batch=work.largest.shape,
        optimizer_steps=work.optimizer_steps,
        trainable=counted.sizes.trainable,
        memory={**counted.memory(), "libraries and allocator": rest},
        peak=max(step, loading),
        loading_peak=loading,
        mapped=counted.sizes.mapped,
        limit=limit,
        free=free_memory(device()),
        device="GPU" if device().type == "cuda" else "machine",
        time=_time(measured, work, params) if measured else {},
        disk=_disk(counted.sizes, params, paths),
        disk_free=shutil.disk_usage(paths.root).free,
        changes=_changes(config, params, paths, counted, rest, limit, loading),
        notes=notes,
    )


def gib(size: float) -> str:
    """Bytes, readable."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.0f} MiB"


def worded(changes: dict[str, Any]) -> str:
    """{"train.batch_size": 4} as a reader of params.yaml writes it."""
    return ", ".join(f"{key}: {value}" for key, value in changes.items())


def _config(path: Path) -> Any:
    if not path.exists():
        raise BaseModelError(f"there is no {path}; run the fetch stage, or give --config FILE with a config.json")
    return without_weights(path).config


class _Counted:
    """What is known of a run without running any of it; size: where it has been counted already."""

    def __init__(self, config: Any, params: Params, work: Workload, size: Sizes | None = None) -> None:
        self.sizes = sizes(config, params, work.optimizer_steps) if size is None else size
        self.step: Activations = activations(config, params, work.largest, work.longest, work.optimizer_steps)

    def memory(self) -> dict[str, int]:
        size, step = self.sizes, self.step
        return {
            "base weights, quantised": size.quantized,
            "base weights, plain": size.plain,
            "base file, mapped": size.mapped,
            "adapter": size.adapters,
            "gradients": size.gradients,
            "optimiser": size.optimizer,
            "activations": step.kept,
            "loss, or the backward's working memory": max(step.loss, step.working + size.dequantized),
        }

    @property
    def peak(self) -> int:
        return sum(self.memory().values())

    @property
    def loading(self) -> int:
        """The weights, their file, and one of them in 16 and in 32 bits on its way."""
        return self.sizes.quantized + self.sizes.plain + self.sizes.mapped + 3 * self.sizes.largest


def _even(config: Any, params: Params, whole: Sizes) -> bool:
    """Whether every block has as many weights as the second, so that two of them tell of all."""
    one, two = (base_on_meta(with_blocks(config, blocks), params).num_parameters() for blocks in (1, 2))
    return abs(2 * (one + (number_of_blocks(config) - 1) * (two - one)) / whole.base_file - 1) < 0.01


def _measured(config: Any, params: Params, work: Workload, timeout: float) -> Measured:
    """The probe's figures, carried on to all blocks."""
    training, evaluation = sequence(work)
    found: list[Measured] = []
    shallow = depths(number_of_blocks(config))
    for blocks in shallow:
        with tempfile.TemporaryDirectory(prefix="peftcore-plan-") as scratch:
            base = Path(scratch) / "base"
            write_shallow_base(with_blocks(config, blocks), base, params.project.seed)
            task = Task(params.model_dump(), str(base), training, evaluation, work.longest, work.optimizer_steps)
            found.append(run_probe(task, Path(scratch), timeout))
    if len(shallow) == 1:
        return found[0]
    return found[0].deeper(found[1], (number_of_blocks(config) - shallow[0]) / (shallow[1] - shallow[0]))


def _time(measured: Measured, work: Workload, params: Params) -> dict[str, float]:
    evaluations = min(params.train.evaluations, work.optimizer_steps)
    passes = seconds_of(work.training, measured.training) / len(work.training)
    return {
        "start": measured.importing + measured.loading,
        "forward and backward": passes * work.forward_passes,
        "optimiser": measured.stepping * work.optimizer_steps,
        "evaluations": seconds_of(work.evaluation, measured.evaluation) * evaluations,
        "checkpoints": measured.saving * evaluations,
    }


def _disk(size: Sizes, params: Params, paths: Paths) -> dict[str, int]:
    """What the stages write; what is there already, and will be written over, is not counted anew."""
    checkpoint = size.adapters + size.optimizer + SMALL
    outputs = {"base": size.base_file, "adapter": size.adapters + SMALL, "merged model": size.unquantized}
    new = {name: 0 if name == "base" and paths.base.exists() else need for name, need in outputs.items()}
    return {
        **new,
        # one more while the newest is written, and the best, which is never removed
        f"checkpoints, {params.train.save_checkpoints} kept": checkpoint * (params.train.save_checkpoints + 2),
        "DVC's cache and remote": sum(new.values()) + new["adapter"],
    }


def _changes(
    config: Any, params: Params, paths: Paths, counted: _Counted, rest: int, limit: int, loading: int
) -> list[Change]:
    """Other choices, and the peak with each: what libraries and the allocator take is taken to stay."""
    found: list[Change] = []
    for given in _choices(params):
        changed = _with(params, given)
        same = counted.sizes if changed.quantization == params.quantization else None
        try:
            other = _Counted(config, changed, workload(changed, paths), same)
        except PlanError:  # such as packs that are shorter than a row
            continue
        peak = max(loading, other.peak + rest)
        mapped = other.sizes.mapped
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
