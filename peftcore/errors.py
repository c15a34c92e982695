"""The library's exceptions. Each message says which value was given, which values fit and what to do next."""


class PeftError(Exception):
    """Base class of all exceptions of peftcore."""


class ConfigError(PeftError, ValueError):
    """An invalid configuration: an unknown key, a wrong type or an impossible value."""


class TargetError(PeftError, ValueError):
    """Target modules that match no layer, or match layers that cannot be adapted."""


class AdapterNameError(PeftError, ValueError):
    """An adapter name that is in use, unknown or not allowed."""


class CheckpointError(PeftError, ValueError):
    """An adapter directory that is damaged, incomplete, of a foreign format or made for another base model."""


class MergeError(PeftError, RuntimeError):
    """A merge that would write wrong weights; the model is unchanged."""


class TrainingError(PeftError, RuntimeError):
    """Training that cannot continue: no trainable parameter, a non-finite loss or a damaged checkpoint."""


class RoutingError(PeftError, ValueError):
    """A mixed batch that cannot be computed with the requested adapters."""


class AdapterStoreError(PeftError, RuntimeError):
    """An adapter that the store cannot load: all slots are in use, or the adapter exceeds the memory budget."""
