"""The tree of typed errors. Each message says what was given, what fits and what to do next."""

from importlib.util import find_spec


class PeftError(Exception):
    """Anything that peftcore refuses; catch this to catch them all."""


class ConfigError(PeftError, ValueError):
    """A configuration that cannot be: unknown key, wrong type, impossible value."""


class TargetError(PeftError, ValueError):
    """Targets that match nothing, or match layers that cannot be adapted."""


class AdapterNameError(PeftError, ValueError):
    """An adapter name that is taken, unknown or not allowed."""


class CheckpointError(PeftError, ValueError):
    """An adapter directory that is corrupt, foreign, incomplete or made for another base."""


class MergeError(PeftError, RuntimeError):
    """A merge that would write something wrong; nothing has been changed."""


class TrainingError(PeftError, RuntimeError):
    """Training that cannot go on: nothing to train, a loss that is not finite, a broken checkpoint."""


class RoutingError(PeftError, ValueError):
    """A batch whose rows cannot be computed by the adapters that were asked for."""


class AdapterStoreError(PeftError, RuntimeError):
    """An adapter that a store cannot give now: no room that is free, or one that can never fit."""


class ExportError(PeftError, ValueError):
    """An adapter or a base model that a file format or its runtime does not support; nothing has been written."""


class MissingExtraError(PeftError, ImportError):
    """A feature whose optional packages are not installed; the message has the command that installs them."""


def require_extra(extra: str, feature: str, *modules: str) -> None:
    """Check that the optional packages of a feature are installed, without importing them.

    Args:
        extra: The extra of this distribution that brings the packages, e.g. "train".
        feature: Who needs the packages, the subject of the message, e.g. "peftcore.train".
        modules: Top-level modules of the packages.

    Raises:
        MissingExtraError: At least one of the modules cannot be found.
    """
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        names = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more packages" if len(missing) > 4 else "")
        raise MissingExtraError(f"{feature} needs {names}; install with: pip install 'peftcore[{extra}]'")
