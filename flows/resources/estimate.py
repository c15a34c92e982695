"""Estimate of a run's memory, time and disk before it starts, and alternatives that fit: `peftcore plan`.

memory   weights and optimiser state (`sizes`, on the meta device), plus one training step (`activations`, on fake
         tensors), plus libraries and allocator. The probe (`probe`) measures the last part by training two shallow
         models of the real widths. Without the probe, the memory of this process takes its place.
time     the probe's time, extrapolated to all blocks and batches; no estimate without the probe
disk     the outputs of the stages
"""

import shutil
import tempfile
from configparser import RawConfigParser
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from flows.base.model import compute_dtype, device, with_merged_dtype
from flows.errors import BaseModelError, EstimateError
from flows.params import Params
from flows.paths import Paths
from flows.resources.batches import Workload, workload
from flows.resources.changes import Change, alternatives, changes
from flows.resources.probe import (
    SHAPES,
    SHAPES_ON_CPU,
    Measured,
    Task,
    batches,
    depths,
    further_shapes,
    seconds_of,
    write_shallow_base,
)
from flows.resources.probe_launch import Probe
from flows.resources.sizes import Sizes, number_of_blocks, with_blocks
from flows.resources.static_memory import StaticMemory, blocks_are_alike
from flows.runtime.machine_memory import free_memory, memory_limit, peak_memory
from flows.stages.detect import without_weights

PROBE_SECONDS = 600.0
"""Time limit of the probe (seconds)."""
SMALL = 2**20
"""Bytes of a checkpoint besides tensors: states, configurations, the manifest."""


@dataclass(frozen=True)
class Estimate:
    """Memory and disk in bytes, time in seconds."""

    model: str
    blocks: int
    batch: tuple[int, int]
    """(rows, tokens) of the batch that needs most memory."""
    optimizer_steps: int
    trainable: int
    """Trained weights (count)."""
    memory: dict[str, int]
    """Memory of the training step at its peak, by kind."""
    peak: int
    """Peak of the train stage."""
    loading_peak: int
    """Peak while the base is loaded."""
    mapped: int
    """Part of the peak that is the base's mapped file, which the system can drop."""
    limit: int
    """Memory of the machine for one process."""
    free: int
    """Part of the limit that is free now."""
    device: str
    time: dict[str, float]
    """Time of the train stage, by kind; empty without the probe."""
    disk: dict[str, int]
    disk_free: int
    changes: list[Change] = field(default_factory=list)
    """Alternatives, the smallest saving first."""
    notes: list[str] = field(default_factory=list)
    """Assumptions behind the figures."""
    processes: int = 1
    """Processes that share the machine's memory; `limit` and `free` are one process's part."""

    @property
    def seconds(self) -> float:
        """Duration of the train stage."""
        return sum(self.time.values())

    @property
    def seconds_per_step(self) -> float:
        """Duration of one optimiser step."""
        return (self.time["forward and backward"] + self.time["optimiser"]) / self.optimizer_steps

    @property
    def fits(self) -> bool:
        """True if memory and disk suffice."""
        return self.peak - self.mapped <= self.limit and sum(self.disk.values()) <= self.disk_free

    @property
    def owner(self) -> str:
        """Subject of sentences about the limit."""
        return f"this {self.device}" if self.processes == 1 else f"each of {self.processes} processes on this machine"

    def as_dict(self) -> dict[str, Any]:
        """Return the estimate as JSON values."""
        per_step = {"seconds_per_step": self.seconds_per_step, "seconds": self.seconds} if self.time else {}
        return {**asdict(self), **per_step, "fits": self.fits}

    def refusal(self) -> str:
        """Return the reason why the run does not fit, and an alternative that does."""
        if self.peak - self.mapped > self.limit:
            needed = gib(self.peak - self.mapped)
            needs = f"training needs {needed} at its peak, and {self.owner} has {gib(self.limit)}"
            helps = next((change for change in self.changes if change.fits), None)
            if helps is None:
                return f"{needs}; no alternative in params.yaml fits: use a smaller base, or a larger machine"
            return f"{needs}; it fits with {as_yaml(helps.params)} ({gib(helps.peak - helps.mapped)})"
        needed = sum(self.disk.values())
        return f"the run needs {gib(needed)} of disk, and {gib(self.disk_free)} are free; free some space"


def estimate(
    params: Params,
    paths: Paths,
    config_file: Path | None = None,
    probe: Probe | None = None,
    timeout: float = PROBE_SECONDS,
) -> Estimate:
    """Estimate the train stage of a run.

    Args:
        params: The parameters of the run.
        paths: The project's files.
        config_file: A config.json, also of a model that is not here; None: the fetched base's.
        probe: The started process that measures two shallow models; None: only count.
        timeout: Time limit of the probe (seconds).

    Raises:
        EstimateError, BaseModelError: The run cannot be estimated.
    """
    _refuse_unsupported(params)
    config = _config(config_file or _base_folder(params, paths))
    work = workload(params, paths)
    counted = StaticMemory(config, params, work)
    notes: list[str] = []
    if not work.prepared:
        notes.append("no prepared rows: every row is assumed to have data.max_length tokens, all supervised")
    if params.method.r == "auto":
        notes.append(f"method.r is auto: estimated with its mean rank of {params.method.auto.r} everywhere")
    if not blocks_are_alike(config, params, counted.sizes):
        notes.append("the blocks differ; the figures are extrapolated from the first blocks")
    libraries = peak_memory(device()) if device().type == "cpu" else 0
    others = alternatives(config, params, paths, counted)
    # last, because nothing else may take the processor's time meanwhile
    measured = _measured(probe, config, params, work, timeout) if probe else None
    if measured is None:
        notes.append("without the probe: libraries as in this process, no time, an allocator without waste")
    loading = libraries + counted.loading
    step = libraries + counted.peak
    if measured:
        step = round(max(measured.peak, measured.evaluation_peak) + measured.shapes)
    rest = step - counted.peak
    sharing = params.train.processes if device().type == "cpu" else 1  # on GPUs, each process has one of its own
    if sharing > 1:
        notes.append(
            f"train.processes is {sharing}: memory is that of one process, and the time is longer than estimated, "
            "because all share the cores"
        )
    limit = memory_limit(device()) // sharing
    return Estimate(
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
        free=free_memory(device()) // sharing,
        device="GPU" if device().type == "cuda" else "machine",
        time=_time(measured, work, params) if measured else {},
        disk=_disk(counted.sizes, params, paths, base_is_here=config_file is None and paths.base.exists()),
        disk_free=shutil.disk_usage(paths.root).free,
        changes=changes(others, libraries, rest, limit),
        notes=notes,
        processes=sharing,
    )


def _refuse_unsupported(params: Params) -> None:
    """Raise EstimateError for parameters whose training cannot be estimated."""
    if params.train.objective != "sft":
        raise EstimateError(f"train.objective is {params.train.objective}; only sft can be estimated")
    if params.train.distillation.teacher is not None:
        raise EstimateError(
            f"train.distillation.teacher is {params.train.distillation.teacher}, whose forward passes are not "
            "estimated; estimate with null, and add the teacher's memory: a version's adapter, or a model's weights"
        )
    if params.quantization.storage == "gguf":
        raise EstimateError(
            "quantization.storage is gguf, whose formats differ by tensor and cannot be estimated; for an upper bound, "
            "estimate with storage int8"
        )


def gib(size: float) -> str:
    """Return a size in bytes as text, in GiB or MiB."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.0f} MiB"


def as_yaml(changes: dict[str, Any]) -> str:
    """Return {"train.batch_size": 4} as in params.yaml."""
    return ", ".join(f"{key}: {value}" for key, value in changes.items())


def _base_folder(params: Params, paths: Paths) -> Path:
    """Return the fetched base's folder; before the fetch stage has run, the folder that `base.source` names."""
    kind, _, name = params.base.source.partition(":")
    here = paths.root / Path(name).expanduser()
    return here if kind == "path" and not paths.base.exists() and here.is_dir() else paths.base


def _config(path: Path) -> Any:
    if not path.exists():
        raise BaseModelError(
            f"there is no {path}; run `peftcore stage fetch`, or give --config FILE with a config.json"
        )
    return without_weights(path).config


def _measured(probe: Probe, config: Any, params: Params, work: Workload, timeout: float) -> Measured:
    """Return the probe's figures, extrapolated to all blocks."""
    blocks, tasks = depths(number_of_blocks(config)), list[Task]()
    with tempfile.TemporaryDirectory(prefix="peftcore-plan-") as scratch:
        for count in blocks:
            base = Path(scratch) / str(count) / "base"
            write_shallow_base(with_blocks(config, count), base, params.project.seed)
            chosen = batches(work, is_first=not tasks, most=SHAPES_ON_CPU if device().type == "cpu" else SHAPES)
            tasks.append(
                Task(
                    params=params.model_dump(),
                    base=str(base),
                    **chosen,
                    longest=work.longest,
                    optimizer_steps=work.optimizer_steps,
                )
            )
        results = probe.measure(tasks, timeout)
    trained_on = len(tasks[0].others) or 1  # the last one is the largest batch again
    first = replace(results[0], shapes=results[0].shapes * (len(further_shapes(work)) + 1) / trained_on)
    return first if len(blocks) == 1 else first.deeper(results[1], (blocks[0], blocks[1]), number_of_blocks(config))


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


def _disk(size: Sizes, params: Params, paths: Paths, base_is_here: bool) -> dict[str, int]:
    """Return the bytes that the stages write. A base that is here already does not count, except for its upload."""
    checkpoint = size.adapters + size.optimizer + SMALL
    merged = size.base_file // 2 * compute_dtype(with_merged_dtype(params.quantization)).itemsize
    if params.merge.into == "requantized":
        merged = size.quantized + size.plain
    outputs = {"base": size.base_file, "adapter": size.adapters + SMALL, "merged model": merged}
    if params.quantization.is_calibrated:
        outputs["calibrated base"] = size.quantized + size.plain
    new = {name: 0 if name == "base" and base_is_here else need for name, need in outputs.items()}
    # the first version's registration uploads all outputs, the base included; later ones find the base there
    uploaded = new if paths.version.exists() else outputs
    return {
        **new,
        # plus one while the newest is written, and the best, which is never removed
        f"checkpoints, {params.train.save_checkpoints} kept": checkpoint * (params.train.save_checkpoints + 2),
        "DVC's cache": sum(new.values()),
        "DVC's remote": sum(uploaded.values()) if _remote_is_folder(paths.root, params.register.remote) else 0,
    }


def _remote_is_folder(root: Path, remote: str) -> bool:
    """Return True if a DVC remote is a folder of this machine, or is not configured yet."""
    config = RawConfigParser()
    config.read([root / ".dvc" / "config", root / ".dvc" / "config.local"], encoding="utf-8")
    return "://" not in config.get(f"'remote \"{remote}\"'", "url", fallback="")
