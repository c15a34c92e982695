"""Options of a variant as one object: a dictionary, the form that is saved, with its keys as attributes."""

from typing import Any

from peftcore.errors import ConfigError, suggestion


class Options(dict[str, Any]):
    """A dictionary whose keys are attributes, too. A subclass lists the options in its `__init__`."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"{type(self).__name__} has no option {name!r}; it has {', '.join(self)}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self:
            raise AttributeError(f"{type(self).__name__} has no option {name!r}; it has {', '.join(self)}")
        self[name] = value

    def to_dict(self) -> dict[str, Any]:
        """Return the options as a plain dictionary."""
        return dict(self)

    @classmethod
    def made_from(cls, values: dict[str, Any], field: str) -> "Options":
        """Return the options in a plain dictionary, such as that of a saved configuration.

        Args:
            values: {option: value}; options that are left out get their defaults.
            field: the field of the configuration that holds the dictionary, for the error message.

        Raises:
            ConfigError: an option is unknown, or a value does not fit.
        """
        if isinstance(values, cls):
            return values
        known = cls()
        for key in values.keys() - known.keys():
            raise ConfigError(f"LoraConfig: {field} has no {key!r}{suggestion(key, known)}")
        return cls(**values)
