"""The stages of dvc.yaml: one module each with `run(params, paths)`, started by `python -m flows.stages.NAME`.

Importing this package sets environment variables that silence libraries, which read them on import. If a stage is
about to run as a program, the garbage collector waits until `flows.runtime.stage.start`: imports leave no garbage, and
looking for it among all the new objects takes one of six seconds. Such a process ends with its parent from here on, so
that a DVC that is killed during these seconds leaves no stage behind. In a run, it only waits for a fork of another
process, which has all imports and does the stage's work; see `flows.runtime.fork_server`.
"""

import gc
import sys

from flows.runtime.fork_server import hand_over
from flows.runtime.processes import die_with_parent
from flows.runtime.stage import set_quiet_environment

set_quiet_environment()
if sys.argv[:1] == ["-m"]:  # Python is looking for the module to run
    die_with_parent()  # other systems than Linux: by the thread of `flows.runtime.stage.start`
    hand_over()
    gc.disable()
