"""The stages of dvc.yaml: one module each with `run(params, paths)`, started by `python -m flows.stages.NAME`.

Importing this package sets environment variables that silence libraries, which read them on import.
"""

from flows.runtime.stage import set_quiet_environment

set_quiet_environment()
