"""The stages of dvc.yaml: one module each, with one `run(params, paths)`, by `python -m flows.stages.NAME`.

Importing this package makes the environment quiet, because the libraries that the stages import at their top
read it on import.
"""

from flows.runtime.stage import set_quiet_environment

set_quiet_environment()
