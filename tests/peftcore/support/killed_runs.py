"""Training runs in processes of their own, which a test may kill: one parent imports everything and forks each run.

HF PEFT cannot be imported in them.

A run tells in which phase it is by one byte in a file, so that what a SIGKILL has hit can be read afterwards.
"""

import ctypes
import gc
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BEGINNING, STEP, EVALUATION, CHECKPOINT, OTHER, ENDING = "begin", "step", "evaluation", "checkpoint", "other", "finish"
PHASES = {name[0]: name for name in (BEGINNING, STEP, EVALUATION, CHECKPOINT, OTHER, ENDING)}
RUNTIMES = ("runtime", "per_second", "total_flos")


class Nursery:
    """The parent; one run at a time."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        # what tensors took goes back to the system, or a run with a limit would find room in what its process has
        environment |= {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self._answer() == "ready"

    def start(self, folder: Path, case: str, **options: Any) -> int:
        """Begin a run in a folder, or go on with what is there; returns its process id."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "phase").write_text(BEGINNING[:1])
        return int(self._ask({"folder": str(folder), "case": case, **options}))

    def wait(self) -> int:
        """The exit status of the run, negative for a signal."""
        return int(self._answer())

    def run(self, folder: Path, case: str, **options: Any) -> int:
        self.start(folder, case, **options)
        return self.wait()

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def _ask(self, job: dict[str, Any]) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


def phase_of(folder: Path) -> str:
    return PHASES[(folder / "phase").read_text()]


def wait_for_phase(folder: Path, phase: str = BEGINNING) -> None:
    """Until a run has left a phase."""
    deadline = time.monotonic() + 60
    while phase_of(folder) == phase and time.monotonic() < deadline:
        time.sleep(0.002)


def history_of(folder: Path) -> list[dict[str, Any]]:
    """What a run that has ended has logged, but for times."""
    history = json.loads((folder / "history.json").read_text())
    return [{k: v for k, v in record.items() if not k.endswith(RUNTIMES)} for record in history]


# -- in the parent and its children ----------------------------------------------------------------------------------


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries may print while they are imported
    sys.modules["peft"] = None  # type: ignore[assignment]  # as where HF PEFT is not installed
    import tiny_training  # noqa: F401  imports all that a run needs
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        trainer_of("grouped", Path(folder))  # what is imported late
    gc.freeze()  # or every child would look through, and copy, all that the parent has
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            status = 70
            try:
                status = train(**job)
            except SystemExit as ended:
                status = int(ended.code or 0)
            except BaseException as error:
                (Path(job["folder"]) / "error.txt").write_text(f"{type(error).__name__}: {error}")
                status = 1
            finally:
                os._exit(status)
        print(child, file=answers, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


def train(folder: str, case: str, resume: bool = False, fault: str = "", at: int = 0, **options: Any) -> int:
    """One run; `fault` names what befalls it, at the `at`-th occasion."""
    run = Path(folder)
    if case == "limited memory":
        from limited_memory import train_limited

        train_limited(run)
        return 0
    if case == "trl":
        from trl_runs import train_both_ways

        train_both_ways(run)
        return 0
    logging.basicConfig(filename=run / "log.txt", level=logging.WARNING)
    if fault == "full disk":
        _small_disk(run / "checkpoints")
    made = trainer_of(case, run / "checkpoints", **options)
    _tell_phases(made, run / "phase")
    if fault:
        _arm(made, fault, at)
    from peftcore.train import last_good_checkpoint

    resumable = resume and last_good_checkpoint(run / "checkpoints") is not None
    try:
        made.train(resume_from_checkpoint=resumable)
    finally:
        listing = sorted(path.name for path in (run / "checkpoints").iterdir())
        good = last_good_checkpoint(run / "checkpoints")
        (run / "left.json").write_text(json.dumps([listing, None if good is None else good.name]))
    made.model.save_pretrained(run / "final")
    (run / "history.json").write_text(json.dumps(made.state.log_history))
    return 0


def trainer_of(case: str, folder: Path, **options: Any) -> Any:
    import torch
    from tiny_training import adapted, rows, trainer
    from transformers import EarlyStoppingCallback

    from peftcore.train import PackedCollator, Packs

    saving: dict[str, Any] = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 2,
        "logging_steps": 3,  # records reach across checkpoints
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "max_steps": 12,
        "lr_scheduler_type": "cosine",
    }
    cases: dict[str, tuple[str, torch.dtype, Any, dict[str, Any]]] = {
        # 7 batches an epoch, so its last accumulation is a smaller one; stopped early unless the patience is forgotten
        "grouped": ("lora", torch.float32, rows(25), {"gradient_accumulation_steps": 2, "learning_rate": 0.05}),
        "random": ("adalora", torch.float32, rows(20), {"train_sampling_strategy": "random"}),
        "packed": ("lora", torch.float32, Packs(rows(40), 48), {"per_device_train_batch_size": 1}),
        "float16": ("lora", torch.float16, rows(20), {"learning_rate": 1e-3}),
    }
    method, dtype, data, own = cases[case]
    if case == "grouped":
        own |= {"train_sampling_strategy": "group_by_length"}
    if case == "packed":
        own["data_collator"] = PackedCollator()
    made = trainer(
        adapted(method, dropout=0.2, dtype=dtype),
        folder,
        data,
        callbacks=[EarlyStoppingCallback(3)],
        **(saving | own | options),
    )
    if case == "float16":  # a scale that changes within these steps
        made.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=2)
    return made


def _tell_phases(made: Any, file: Path) -> None:
    """Let a trainer say which part of the loop it is in."""
    descriptor = os.open(file, os.O_WRONLY)

    def told(name: str, phase: str) -> None:
        inner = getattr(made, name)

        def outer(*args: Any, **kwargs: Any) -> Any:
            os.pwrite(descriptor, phase[:1].encode(), 0)
            try:
                return inner(*args, **kwargs)
            finally:
                os.pwrite(descriptor, OTHER[:1].encode(), 0)

        setattr(made, name, outer)

    told("training_step", STEP)
    told("_evaluate", EVALUATION)
    told("_save_checkpoint", CHECKPOINT)
    told("_finalize_training", ENDING)


def _arm(made: Any, fault: str, at: int) -> None:
    import torch

    from peftcore.train import checkpoints, resume

    seen = 0

    def due() -> bool:
        nonlocal seen
        seen += 1
        return seen == at

    def at_call(owner: Any, name: str, number: signal.Signals, after: bool = False) -> None:
        inner = getattr(owner, name)

        def outer(*args: Any, **kwargs: Any) -> Any:
            hit = due()
            if hit and not after:
                os.kill(os.getpid(), number)
            result = inner(*args, **kwargs)
            if hit and after:
                os.kill(os.getpid(), number)
            return result

        setattr(owner, name, outer)

    def torn(value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        write(value, path, *args, **kwargs)
        if due():
            os.truncate(path, Path(path).stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    write = torch.save
    if fault == "kill in step":
        at_call(made, "compute_loss", signal.SIGKILL)
    elif fault == "kill in evaluation":
        at_call(made.training_objective, "row_metrics", signal.SIGKILL)
    elif fault == "torn file":
        torch.save = torn
    elif fault == "kill before the manifest":
        at_call(checkpoints, "write_manifest", signal.SIGKILL)
    elif fault == "kill before old ones go":
        at_call(resume, "keep_latest", signal.SIGKILL)
    elif fault == "term in step":
        at_call(made, "compute_loss", signal.SIGTERM)
    elif fault == "term in evaluation":
        at_call(made.training_objective, "row_metrics", signal.SIGTERM)
    elif fault == "term in checkpoint":
        at_call(checkpoints, "write_manifest", signal.SIGTERM)
    elif fault == "full disk":
        at_call(resume, "keep_latest", signal.SIGUSR1, after=True)
        signal.signal(signal.SIGUSR1, lambda *_: _fill(Path(made.args.output_dir)))
    else:
        raise LookupError(fault)


# -- a disk that fills -----------------------------------------------------------------------------------------------


def _small_disk(folder: Path) -> None:
    """A file system of 4 MiB for this process alone, where the system allows it."""
    folder.mkdir(exist_ok=True)
    libc = ctypes.CDLL(None, use_errno=True)
    new_mounts, private = 0x00020000, (1 << 14) | (1 << 18)
    if libc.unshare(new_mounts) == 0 and libc.mount(None, b"/", None, private, None) == 0:
        libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, b"size=4m")


def _fill(folder: Path) -> None:
    """Take all of a small disk but 16 KiB, or forbid files of more than that where there is none."""
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    if free > 2**23:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, 2**14))
    else:
        (folder / "filler").write_bytes(bytes(free - 2**14))


if __name__ == "__main__":
    serve()
