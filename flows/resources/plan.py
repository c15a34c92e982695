"""`peftcore plan`: how much memory, time and disk a run will take, and what would make it fit, before it is started.

memory   what is kept whatever the batch (`sizes`, on the meta device), what a step adds (`activations`,
         on fake tensors), and what libraries and the allocator add: measured by the probe (`probe`), which
         trains two shallow models of the real widths, or else what this process itself takes
time     the probe's, for all blocks and every batch of the run; none without it
disk     what the stages will write
"""

import shutil
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flows.base.model import device
from flows.errors import BaseModelError, PlanError
from flows.params import Params
from flows.paths import Paths
from flows.resources.batches import Workload, workload
from flows.resources.changes import Change, changes
from flows.resources.counted import Counted, blocks_are_alike
from flows.resources.probe import Measured, Task, depths, run_probe, seconds_of, sequence, write_shallow_base
from flows.resources.sizes import Sizes, number_of_blocks, with_blocks
from flows.runtime.machine_memory import free_memory, memory_limit, peak_memory
from flows.stages.detect import without_weights

PROBE_SECONDS = 600.0
"""How long one of the probe's processes may take."""
SMALL = 2**20
"""Bytes of a checkpoint that are not tensors: states, configurations, the manifest."""


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
            needed = gib(self.peak - self.mapped)
            said = f"training needs {needed} at its peak, and this {self.device} has {gib(self.limit)}"
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
    counted = Counted(config, params, work)
    notes = [] if work.prepared else ["no prepared rows: each is taken to be data.max_length tokens, all supervised"]
    if params.method.r == "auto":
        notes.append(f"method.r is auto: planned with its mean rank of {params.method.auto.r} everywhere")
    if not blocks_are_alike(config, params, counted.sizes):
        notes.append("the blocks differ from one another, and figures are those of the first ones carried on")
    libraries = peak_memory(device()) if device().type == "cpu" else 0
    measured = _measured(config, params, work, timeout) if probe else None
    if measured is None:
        notes.append("without the probe: libraries as in this process, no time, an allocator that wastes nothing")
    loading = libraries + counted.loading
    step = round(max(measured.peak, measured.evaluation_peak)) if measured else libraries + counted.peak
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
        disk=_disk(counted.sizes, params, base_is_here=config_file is None),
        disk_free=shutil.disk_usage(paths.root).free,
        changes=changes(config, params, paths, counted, libraries, rest, limit),
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
    return found[0].deeper(found[1], (shallow[0], shallow[1]), number_of_blocks(config))


def _time(measured: Measured, work: Workload, params: Params) -> dict[str, float]:
    evaluations = min(params.train.evaluations, work.optimizer_steps)
    passes = seconds_of(work.training, measured.training) / len(work.training)
    return {
        "libraries": measured.importing,
        "loading the base": measured.loading,
        "forward and backward": passes * work.forward_passes,
        "optimiser": measured.stepping * work.optimizer_steps,
        "evaluations": seconds_of(work.evaluation, measured.evaluation) * evaluations,
        "checkpoints": measured.saving * evaluations,
    }


def _disk(size: Sizes, params: Params, base_is_here: bool) -> dict[str, int]:
    """What the stages write; what is there already, and will be written over, is not counted anew."""
    checkpoint = size.adapters + size.optimizer + SMALL
    outputs = {"base": size.base_file, "adapter": size.adapters + SMALL, "merged model": size.unquantized}
    new = {name: 0 if name == "base" and base_is_here else need for name, need in outputs.items()}
    return {
        **new,
        # one more while the newest is written, and the best, which is never removed
        f"checkpoints, {params.train.save_checkpoints} kept": checkpoint * (params.train.save_checkpoints + 2),
        "DVC's cache and remote": sum(new.values()) + new["adapter"],
    }
