"""Configurations: declarative, checked when made, and the same JSON as PEFT's `adapter_config.json`.

A person's misspelt key is an error with a suggestion. A key that a newer version wrote to disk is kept and warned
of. A key whose value asks for mathematics that is not here is refused, since ignoring it would give other numbers.
"""

import dataclasses
import difflib
import json
import sys
import warnings
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Self, Union, get_args, get_origin

from peftcore._util.patterns import SEGMENTS, branches, compiled, is_suffix
from peftcore.errors import CheckpointError, ConfigError
from peftcore.files import CONFIG_NAME, read_limited, whole_files, write_atomically

LARGEST_CONFIG = 16 << 20
"""Bytes; a rank of its own for each of 100,000 experts takes about half of it."""
_MOST_PATTERNS = 200
"""Regular expressions among the keys of one field; names of modules are not counted."""

LORA_FAMILY_NEUTRAL: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "kasa_config": None,
    "layer_replication": None,
    "loftq_config": {},
    "lora_bias": False,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "monteclora_config": None,
    "qalora_group_size": 16,
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "velora_config": None,
}
"""What PEFT writes for LoRA and the methods that extend it, at values that change nothing."""


BLOCK = (r".*?\b", r"\.(?P<block_number>\d+)\..*")
"""What stands before and after the name of a block list in a path."""


def first_match(pattern: dict[str, Any] | None, path: str, default: Any) -> Any:
    """The value of the first key, a path suffix or regular expression, that matches `path`."""
    if not pattern:
        return default
    return next((value for key, value in pattern.items() if is_suffix(key, path)), default)


class TaskType(StrEnum):
    """What the adapted model is for, under PEFT's names."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a value is of an annotated type, what it holds too; JSON's lists fit."""
    if get_origin(annotation) in (Union, UnionType):
        return any(_fits(value, part) for part in get_args(annotation))
    kind = get_origin(annotation) or annotation
    if kind is Any or not isinstance(kind, type):  # such as the string that a postponed annotation is
        return True
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind in (list, set, tuple):
        inside = [part for part in get_args(annotation) if part is not Ellipsis]
        held = inside[0] if len(set(inside)) == 1 else Any
        return isinstance(value, list | set | frozenset | tuple) and all(_fits(item, held) for item in value)
    return isinstance(value, kind)


def _words_for(annotation: Any) -> str:
    """An annotated type as a person says it."""
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(_words_for, get_args(annotation))))
    kind = get_origin(annotation) or annotation
    words = {int: "an integer", float: "a number", bool: "True or False", str: "a string", type(None): "None"}
    if kind in (list, set, tuple):
        many = {int: "integers", float: "numbers", str: "strings"}
        held = {many[part] for part in get_args(annotation) if part in many}
        return f"a list of {held.pop()}" if len(held) == 1 else "a list"
    return (words | {dict: "a dictionary"}).get(kind, getattr(kind, "__name__", str(kind)))


def suggestion(word: str, known: list[str]) -> str:
    """`; did you mean X?`, or the words that fit when none is near."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(sorted(known))}"


def parsed_json(content: bytes) -> Any:
    """JSON as its standard has it. Raises ValueError for anything else, such as NaN, a key twice, endless nesting."""

    def refuse(word: str) -> Any:
        raise ValueError(f"{word} is no number in JSON")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key is given twice")
        return found

    try:
        return json.loads(content, parse_constant=refuse, object_pairs_hook=once)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


@dataclass
class PeftConfig:
    """What every adapter's configuration has. Field names are those of PEFT's `adapter_config.json`."""

    has_schedule: ClassVar[bool] = False
    """True if training follows a schedule over one whole run; a finished adapter then cannot be trained further."""
    peft_type: ClassVar[str] = ""
    """Set when a method registers, such as "LORA"."""

    ignored_on_disk: ClassVar[dict[str, Any]] = {}
    """Keys that PEFT writes for this method and that change nothing at these values: {key: neutral value}."""

    task_type: TaskType | str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    """True freezes the adapter when it is added."""
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    extra: dict[str, Any] = field(default_factory=dict, repr=False)
    """Keys read from disk that this version does not know; written back as they were."""

    def __new__(cls, *_args: Any, **given: Any) -> Self:
        known = [f.name for f in dataclasses.fields(cls)]
        for key in given:
            if key not in known:
                raise ConfigError(f"{cls.__name__}: unknown option {key!r}{suggestion(key, known)}")
        return object.__new__(cls)

    def __post_init__(self) -> None:
        self._check_types()
        if self.task_type is not None:
            self.task_type = self.one_of("task_type", self.task_type, TaskType)

    # -- checks shared by the methods' configurations ---------------------------------------------------------

    def _check_types(self) -> None:
        for field_ in dataclasses.fields(self):
            value = getattr(self, field_.name)
            if not _fits(value, field_.type):
                raise ConfigError(
                    f"{type(self).__name__}: {field_.name} must be {_words_for(field_.type)}; got {value!r:.200}"
                )
            if field_.name.endswith("_pattern") and isinstance(value, dict):
                self._check_pattern(field_.name, value, field_.type)

    def _check_pattern(self, name: str, pattern: dict[str, Any], annotation: Any) -> None:
        values = next((get_args(part)[1] for part in get_args(annotation) if get_origin(part) is dict), Any)
        for key, value in pattern.items():
            self.regular_expression(name, key, SEGMENTS)
            if not _fits(value, values) or (name == "rank_pattern" and values is int and value < 1):
                kind = "a positive integer" if name == "rank_pattern" and values is int else _words_for(values)
                raise ConfigError(f"{type(self).__name__}: {name}[{key!r}] must be {kind}; got {value!r:.200}")
        if len(pattern) > _MOST_PATTERNS and sum(map(branches, pattern)) > _MOST_PATTERNS:
            raise ConfigError(
                f"{type(self).__name__}: {name} holds more than {_MOST_PATTERNS} regular expressions; name the modules"
            )

    def regular_expression(self, name: str, text: str, before: str = "", after: str = "") -> None:
        """`text`, from the named field, is a regular expression, also between two of ours."""
        try:
            compiled(text, before, after)
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"{type(self).__name__}: {name} {text!r:.200} is no regular expression ({error}); give a list of names"
            ) from error

    def one_of(self, name: str, value: Any, choices: Any) -> Any:
        """`value` if it is among `choices`, else a ConfigError that names them."""
        if value not in list(choices):
            fits = ", ".join(repr(str(c)) for c in choices)
            raise ConfigError(f"{type(self).__name__}: {name} must be one of {fits}; got {value!r}")
        return TaskType(value) if choices is TaskType else value

    def positive(self, *names: str) -> None:
        """Each named field is an integer of at least 1."""
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{type(self).__name__}: {name} must be a positive integer; got {value!r}; try 8")

    def probability(self, *names: str) -> None:
        """Each named field is in [0, 1)."""
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value < 1:
                raise ConfigError(f"{type(self).__name__}: {name} must be at least 0 and below 1; got {value!r}")

    @classmethod
    def schedule_options(cls, total_steps: int, warmup_share: float, final_share: float) -> dict[str, Any]:
        """Return the options that fit the method's schedule to a training run; {} for methods without a schedule.

        Args:
            total_steps: Optimiser steps of the whole run.
            warmup_share: Share of the steps before the schedule begins.
            final_share: Share of the steps after the schedule has ended.
        """
        return {}

    # -- JSON ------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, `peft_type` included; sets become sorted lists."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "extra"}
        plain = {k: sorted(v) if isinstance(v, set | frozenset) else v for k, v in values.items()}
        return {**self.extra, **plain, "peft_type": self.peft_type}

    def to_json(self) -> str:
        """What stands in `adapter_config.json`."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_dict(cls, values: dict[str, Any], from_disk: bool = False) -> "PeftConfig":
        """Build the configuration class that `peft_type` names (or `cls` itself).

        from_disk: keep and warn of unknown keys; otherwise they are a ConfigError.
        Raises ConfigError for an unknown method, a misspelt key or a value that does not fit.
        """
        from peftcore.registry import method_named

        values = dict(values)
        named = values.pop("peft_type", None) or cls.peft_type
        if not named or not isinstance(named, str):
            raise ConfigError(f"configuration without peft_type, or with one that is no word: {named!r}; try 'LORA'")
        target = method_named(named).config
        if not from_disk:
            return target(**values)
        known = {f.name for f in dataclasses.fields(target)}
        extra = {k: v for k, v in values.items() if k not in known}
        target._refuse_other_mathematics(extra)
        config = target(**{k: v for k, v in values.items() if k in known})
        config.extra = extra
        return config

    @classmethod
    def _refuse_other_mathematics(cls, extra: dict[str, Any]) -> None:
        for key, value in extra.items():
            if value == cls.ignored_on_disk.get(key, value) or not value:
                if key not in cls.ignored_on_disk and value:
                    warnings.warn(f"{CONFIG_NAME}: {key!r} is unknown to this version; kept, not used", stacklevel=4)
                continue
            raise ConfigError(
                f"{CONFIG_NAME}: {key}={value!r} is not supported by {cls.peft_type} here, and leaving it out "
                "would give other numbers; merge that adapter with the library that made it"
            )

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "PeftConfig":
        """Read `adapter_config.json` from an adapter directory; CheckpointError if it is absent or not JSON."""
        path = whole_files(Path(directory)) / CONFIG_NAME
        if not path.is_file():
            raise CheckpointError(f"no {CONFIG_NAME} in {directory}; give the directory that save_pretrained wrote")
        try:
            values = parsed_json(read_limited(path, LARGEST_CONFIG))
        except ValueError as error:
            raise CheckpointError(f"{path} is not valid JSON ({error}); the file is damaged") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"{path} holds a {type(values).__name__}, not the fields of a configuration")
        return cls.from_dict(values, from_disk=True)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `adapter_config.json` atomically."""
        write_atomically(Path(directory) / CONFIG_NAME, self.to_json())


@dataclass
class PromptLearningConfig(PeftConfig):
    """A method that adapts what the model reads. The sizes that are None are taken from the model."""

    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    """Width of a virtual token."""
    num_transformer_submodules: int | None = None
    """2: one prompt for an encoder and one for a decoder."""
    num_attention_heads: int | None = None
    num_layers: int | None = None
    modules_to_save: list[str] | None = None
    """Modules trained whole, one copy per adapter, and saved with it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("num_virtual_tokens")
        sizes = ("token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers")
        self.positive(*(name for name in sizes if getattr(self, name) is not None))


@dataclass
class TunerConfig(PeftConfig):
    """A method that adapts layers: which layers, and what else is trained and saved with them."""

    target_modules: list[str] | set[str] | str | None = None
    """Path suffixes, a regular expression over the whole path, or "all-linear"; None: the architecture's default."""
    exclude_modules: list[str] | set[str] | str | None = None
    modules_to_save: list[str] | None = None
    """Modules trained whole, one copy per adapter, and saved with it."""
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    """Name of the block list that layers_to_transform counts in, such as "layers"; None: found in the path."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str):
                self.regular_expression(name, value)
            elif value is not None:
                setattr(self, name, set(value))
        empty = self.target_modules is not None and not self.target_modules
        if empty and not getattr(self, "target_parameters", None):
            raise ConfigError(f"{type(self).__name__}: target_modules is empty; name a layer or use 'all-linear'")
        for pattern in [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern or []:
            self.regular_expression("layers_pattern", pattern, *BLOCK)
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError(f"{type(self).__name__}: layers_pattern needs layers_to_transform; give both or neither")


_NOT_SHOWN = {"bias", "fan_in_fan_out", "inference_mode"}
_STEMS = {"rank_pattern": "r"}
"""Patterns that are not named after the option whose value they change."""


def options_at(config: PeftConfig, path: str = "") -> dict[str, bool | int | float | str]:
    """Options of a method at the layer `path`, to print: numbers that are not zero, and what is not at its default."""
    inherited = {option.name for kind in (PeftConfig, TunerConfig) for option in dataclasses.fields(kind)}
    shown: dict[str, bool | int | float | str] = {}
    for option in dataclasses.fields(config):
        value = getattr(config, option.name)
        if option.name in inherited | _NOT_SHOWN or not isinstance(value, bool | int | float | str):
            continue
        for pattern in (name for name in vars(config) if name.endswith("_pattern")):
            stem = _STEMS.get(pattern, pattern.removesuffix("_pattern"))
            if option.name == stem or (len(stem) > 1 and option.name.endswith(f"_{stem}")):
                value = first_match(getattr(config, pattern), path, value)
        counts = not isinstance(value, bool | str) and value != 0
        if counts or value != option.default:
            shown[option.name] = value
    return shown
