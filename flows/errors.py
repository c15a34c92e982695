"""The tree of pipeline errors. Each message says what was given, what fits and what to do next.

Exit statuses of `peftcore` besides 0: 1: refused or failed; 2: invalid command line; 3: refused by the gate; 4:
conflict, another writer was faster, run it again; 130: interrupted; 143: SIGTERM.
"""


class PipelineError(Exception):
    """Base of all errors that a stage turns into one message and exit status `status`."""

    status = 1


class ParamsError(PipelineError, ValueError):
    """A params.yaml with an unknown key, a wrong type or an invalid value; names each line."""


class BaseModelError(PipelineError, ValueError):
    """A base model that cannot be fetched or used."""


class DataError(PipelineError, ValueError):
    """Data that is missing, empty, malformed or cannot be trained on."""


class StageError(PipelineError, RuntimeError):
    """A stage that cannot run or failed: an absent input, or a failed subprocess."""


class StageStopped(StageError):
    """A stage that was stopped on purpose, such as the training of a pruned trial."""


class RepositoryError(PipelineError, RuntimeError):
    """A git or DVC repository that is absent or not usable in its state."""


class RegistryError(PipelineError, RuntimeError):
    """A version or stage of the registry that is unknown, taken or was changed by another writer."""


class RegistryConflict(RegistryError):
    """Another writer created the same version or stage first; nothing was changed here."""

    status = 4


class BusyError(PipelineError, RuntimeError):
    """Another process does the same work already."""

    status = 4


class GateError(PipelineError, RuntimeError):
    """A candidate that the promotion gate refuses; the message is the reason."""

    status = 3


class EstimateError(PipelineError, ValueError):
    """A run whose resources cannot be estimated, or that does not fit this machine."""


class ChatError(PipelineError, ValueError):
    """A line of a chat that cannot be answered or obeyed; the chat goes on."""


class ReviewError(PipelineError, RuntimeError):
    """A run to review that is absent, unreachable or unreadable."""
