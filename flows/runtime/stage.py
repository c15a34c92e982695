"""Start of a stage: environment, seed, and errors that end in one message and exit status 1.

Nothing heavy is imported at the top, because `flows.stages` imports this module first to set the environment that those
libraries read.
"""

import atexit
import errno
import gc
import logging
import os
import random
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from flows.errors import PipelineError, StageError
from flows.paths import Paths
from flows.runtime import logs
from flows.runtime.processes import watch_parent
from flows.runtime.stage_inputs import changed_inputs, stage_inputs

if TYPE_CHECKING:
    from flows.params import Params

QUIET_ENVIRONMENT = {
    "WANDB_MODE": "offline",
    "WANDB_ERROR_REPORTING": "false",
    "DVC_NO_ANALYTICS": "1",
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "HF_HUB_OFFLINE": "1",
}
"""Defaults that keep libraries offline; variables that are already set do not change."""

OBJECTS_BETWEEN_COLLECTIONS = 20_000
"""New objects after which the garbage collector looks at them. Python's default of 700 costs the prepare stage 2 s."""
_NUMPY_WROTE_LESS = re.compile(r"\d+ requested and \d+ written")
logger = logging.getLogger(__name__)


def start(run: Callable[["Params", Paths], Callable[[], None] | None]) -> NoReturn:
    """Run a stage in the current directory, which has params.yaml, and exit the process.

    Args:
        run: Does the stage's work. It may return a function that removes what only a second run would need; this
            function is called if no input of the stage has changed meanwhile.

    Exit status: 0: done; 1 with one `error: ...` message on stderr: refused, disk full, or a missing permission; 130:
    Ctrl-C; 143: SIGTERM, after training has saved its state. Any other exception is a bug and keeps its traceback.
    """
    set_quiet_environment()
    from flows.params import load_params
    from peftcore.errors import PeftError

    spare_garbage_collection()
    watch_parent()
    signal.signal(signal.SIGTERM, exit_on_signal)
    logs.set_up()
    paths = Paths(Path.cwd())
    try:
        params = load_params(paths.params)
        name, inputs = stage_name(), stage_inputs(paths.root, stage_name())
        set_seed(params.project.seed)
        finish = run(params, paths)
        if changed := changed_inputs(inputs, stage_inputs(paths.root, name)):
            raise StageError(
                f"{', '.join(changed)} changed while stage {name} ran, and its results belong to the former state; "
                "bring that state back and run it again (training goes on from its last checkpoint), or run it with "
                "the new state; edit only what no running stage reads"
            )
        if finish is not None:
            finish()
    except KeyboardInterrupt:
        fail("interrupted; run it again to continue", status=130)
    except (PeftError, PipelineError) as error:
        fail(str(error))
    except Exception as error:
        if message := refused_by_system(error):
            fail(message)
        raise
    sys.exit(0)


def spare_garbage_collection() -> None:
    """Let the garbage collector look at new objects only, more rarely, and at none at the end of the process.

    The objects of imported modules, half a million of them, live as long as the stage. Looking at all of them once more
    at the end takes 1 to 2 seconds.
    """
    gc.freeze()
    gc.set_threshold(OBJECTS_BETWEEN_COLLECTIONS, 10, 10)
    gc.enable()
    atexit.register(spare_last_collection)


def spare_last_collection() -> None:
    """Leave the collection at the end of the process out, except with Triton, which then prints all that it has made.

    Triton comes with PyTorch's builds for GPUs. Its nanobind takes objects that nobody has collected for leaks.
    """
    with_triton = any(name.startswith("triton._C") for name in sys.modules)
    (gc.unfreeze if with_triton else gc.freeze)()


def stage_name() -> str:
    """Return the last part of the name of the module that this process runs, such as train of flows.stages.train."""
    spec = sys.modules["__main__"].__spec__
    return "" if spec is None else spec.name.rpartition(".")[2]


def set_quiet_environment() -> None:
    """Set each variable of QUIET_ENVIRONMENT that is not set; outside a terminal, progress bars redraw rarely."""
    # importing bitsandbytes looks for an optional inference kernel on the hub, which training does not use, and warns
    for name in ("bitsandbytes.backends.cpu.ops", "kernels._internals.hf_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    bars = {} if sys.stderr.isatty() else {"TQDM_MININTERVAL": "10"}
    for name, value in (QUIET_ENVIRONMENT | bars).items():
        os.environ.setdefault(name, value)


def set_seed(seed: int) -> None:
    """Seed Python, NumPy and, if it is loaded, torch (all devices); torch is not imported for this."""
    import numpy

    random.seed(seed)
    numpy.random.seed(seed)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(seed)


def is_disk_full(error: BaseException) -> bool:
    """Return True if an exception, or one in its chain, says that no space (or quota) is left.

    Rust libraries (safetensors) raise their own type with the system's error as text. NumPy, with which GGUF files are
    written, raises an OSError that has the numbers of elements only.
    """
    full = (errno.ENOSPC, errno.EDQUOT)
    return any(
        (isinstance(one, OSError) and (one.errno in full or _NUMPY_WROTE_LESS.fullmatch(str(one))))
        or os.strerror(errno.ENOSPC) in str(one)
        for one in _chain(error)
    )


def refused_by_system(error: BaseException) -> str | None:
    """Return the message for a full disk or a missing permission in an exception's chain; None for any other one."""
    if is_disk_full(error):
        return f"the disk is full ({error}); free some space and run it again; existing files are intact"
    for one in _chain(error):
        if isinstance(one, OSError) and one.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            subject = one.filename or "a file"
            return f"{subject}: {one.strerror}; allow this user to read and write it and its folder, and run it again"
    return None


def fail(message: str, status: int = 1) -> NoReturn:
    """Write one `error: ...` message to stderr, or a record in a JSON log, and exit."""
    if logs.is_json():
        logger.error("%s", message, extra={"status": status})
    else:
        print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def exit_on_signal(number: int, _frame: object) -> NoReturn:
    """Exit by an exception, so that temporary files are removed."""
    sys.exit(128 + number)
