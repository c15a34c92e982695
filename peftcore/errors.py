"""The library's exceptions. Each message says which value was given, which values fit and what to do next."""

import difflib
from collections.abc import Collection
from importlib.util import find_spec


def suggestion(word: str, known: Collection[str]) -> str:
    """Return "; did you mean X?" for the end of an error message, or the known words if none is similar."""
    similar = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {similar[0]!r}?" if similar else f"; known: {', '.join(sorted(known))}"


def pickle_advice(source: object, subfolder: str | None = None) -> str:
    """Return the end of an error message that refuses a pickle: the reason, and the command that converts it.

    Args:
        source: The directory or hub id that holds the pickle.
        subfolder: Folder of the pickle inside of `source`.
    """
    inside = f" --subfolder {subfolder}" if subfolder else ""
    return (
        "a pickle can run code when it is loaded, so it is not read. If you trust its source, convert it: "
        f"python -m peftcore.storage.convert_bin {source} NEW_DIRECTORY{inside}"
    )


class PeftError(Exception):
    """Base class of all exceptions of peftcore."""


class ConfigError(PeftError, ValueError):
    """An invalid configuration: an unknown key, a wrong type or an impossible value."""


class UnknownOptionError(ConfigError, TypeError):
    """A configuration with an option that its method does not have."""


class UnknownMethodError(ConfigError, KeyError):
    """A configuration whose `peft_type` is missing or names no method; HF PEFT raises a KeyError there."""

    __str__ = Exception.__str__  # a KeyError shows its message in quotes


class OptionTypeError(ConfigError, TypeError):
    """A configuration with an option whose value has a wrong type."""


class OptionChoiceError(ConfigError, NotImplementedError):
    """An option with a value that is none of its choices; HF PEFT raises a NotImplementedError for an unknown bias."""


class OptionRangeError(ConfigError, IndexError):
    """An option with an index outside of the model: of a token, or of a block."""


class ConversionError(ConfigError, TypeError):
    """An adapter that no LoRA can replace, or a model without such an adapter; nothing is changed."""


class TargetError(PeftError, ValueError):
    """Target modules that match no layer, or match layers that cannot be adapted."""


class NoMatchingPeftModuleError(TargetError):
    """Target modules that match no layer of the model."""


class PeftWarning(UserWarning):
    """A warning that HF PEFT also gives under this class name; all other warnings of peftcore are UserWarnings."""


class NoLayersError(TargetError, TypeError):
    """A model whose adapters are prompts, given to a function for adapters of layers."""


class LayerKindError(TargetError, TypeError):
    """An adapter of layers of a kind that a function does not fit."""


class AdapterNameError(PeftError, ValueError, KeyError):
    """An adapter name that is in use, unknown or not allowed; HF PEFT raises a ValueError or a KeyError there."""

    __str__ = Exception.__str__


class NoAdaptersError(AdapterNameError, AttributeError):
    """A model without adapters, given to a function for adapters; HF PEFT raises an AttributeError in some of them."""


class CheckpointError(PeftError, ValueError):
    """An adapter directory that is damaged, incomplete, of a foreign format or made for another base model."""


class GgufError(PeftError, ValueError):
    """A GGUF file that is no such file, damaged, or of a kind that is not supported."""


class SizeMismatchError(CheckpointError, RuntimeError):
    """Saved tensors with other shapes than the adapter's; PyTorch and HF PEFT raise a RuntimeError there."""


class HotswapError(PeftError, ValueError, RuntimeError):
    """A saved adapter that cannot take the place of a loaded one; the model is unchanged."""


class MergeError(PeftError, RuntimeError, ValueError):
    """A merge that would write wrong weights; the model is unchanged."""


class PromptMergeError(MergeError, AttributeError):
    """A merge of a prompt, which changes no weight; HF PEFT's models with prompts lack the methods of merging."""


class TrainingError(PeftError, RuntimeError):
    """Training that cannot start or continue, such as for unsupported inputs, a non-finite loss or lack of memory."""


class RoutingError(PeftError, ValueError):
    """A mixed batch that cannot be computed with the requested adapters."""


class AdapterStoreError(PeftError, RuntimeError):
    """An adapter that the store cannot load: all slots are in use, or the adapter exceeds the memory budget."""


class ExportError(PeftError, ValueError):
    """A refused export: an adapter, base or option that is not supported, or a damaged base. No output was written."""


class MissingExtraError(PeftError, ImportError):
    """A feature was used whose optional packages are not installed; the message has the command that installs them."""


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
