"""The tree of pipeline errors. Each message says what was given, what fits and what to do next.

The exit statuses of `peftcore`, beside 0: 1 for what is refused or failed, 2 for a command line that cannot be read, 3
where the gate refuses, 4 where somebody else was first and another try may succeed, 130 and 143 for an interruption and
SIGTERM.
"""


class PipelineError(Exception):
    """Anything that the pipeline refuses; a stage turns it into one message and exit `status`."""

    status = 1


class ParamsError(PipelineError, ValueError):
    """A params.yaml with an unknown key, a wrong type or an impossible value; names each line."""


class BaseModelError(PipelineError, ValueError):
    """A base model that cannot be fetched or used."""


class DataError(PipelineError, ValueError):
    """Data that is missing, empty, malformed or cannot be trained on."""


class StageError(PipelineError, RuntimeError):
    """A stage that cannot run or failed: an input that is absent, a subprocess that ended badly."""


class RepositoryError(PipelineError, RuntimeError):
    """A git or DVC repository that is absent or not in a state to work with."""


class RegistryError(PipelineError, RuntimeError):
    """A version or stage in the registry that is unknown, taken or was changed by somebody else."""


class RegistryConflict(RegistryError):
    """Somebody else wrote the same version or stage first; nothing was changed here."""

    status = 4


class BusyError(PipelineError, RuntimeError):
    """The same work is being done by another process already."""

    status = 4


class GateError(PipelineError, RuntimeError):
    """A candidate that the promotion gate refuses; the message is the reason."""

    status = 3


class PlanError(PipelineError, ValueError):
    """A run that cannot be planned, or that will not fit this machine."""


class ReviewError(PipelineError, RuntimeError):
    """A run that is to be reviewed and is not there, cannot be reached or cannot be read."""
