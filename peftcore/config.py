"""Adapter configurations: dataclasses that are checked on creation and saved as PEFT's `adapter_config.json`.

A misspelt keyword argument is an error with a suggestion. A key on disk that this version does not know is kept, with a
warning. A key on disk that asks for unsupported mathematics is refused, because ignoring the key would change results.
"""

import copy
import dataclasses
import importlib.metadata
import inspect
import json
import os
import sys
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, ClassVar, Self, Union, get_args, get_origin

from peftcore._util.patterns import SEGMENTS, branches, compiled, is_suffix
from peftcore.errors import (
    CheckpointError,
    ConfigError,
    OptionChoiceError,
    OptionTypeError,
    UnknownMethodError,
    UnknownOptionError,
    suggestion,
)
from peftcore.files import CONFIG_NAME, hub, read_limited, whole_files, write_atomically
from peftcore.registry import PeftType, method_named, methods

if TYPE_CHECKING:
    from torch import Tensor

    from peftcore.kernels.factors import Factors

__version__ = "0.21.2"
"""Version of HF PEFT whose file format is written: `peft_version` of a new configuration."""
LARGEST_CONFIG = 16 << 20
"""Largest configuration file that is read, in bytes. A `rank_pattern` of 100,000 experts takes half of the limit."""
ALL_LINEAR = "all-linear"
"""The value of `target_modules` that names every linear layer except the head."""
_MOST_PATTERNS = 200
"""Most regular expressions among the keys of one field. Plain module names do not count."""

BLOCK = (r".*?\b", r"\.(?P<block_number>\d+)\..*")
"""Regular expressions of the path before and after the name of a block list."""


def first_match(pattern: dict[str, Any] | None, path: str, default: Any) -> Any:
    """Return the value of the first key (path suffix or regular expression) that matches `path`, else `default`."""
    if not pattern:
        return default
    return next((value for key, value in pattern.items() if is_suffix(key, path)), default)


class TaskType(str, Enum):
    """Task of the adapted model, under PEFT's names. The text of a member is "TaskType.CAUSAL_LM", as in PEFT."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


def _fits(value: Any, annotation: Any) -> bool:
    """Return True if the value and its items have the annotated type. A list fits a set or tuple, as in JSON."""
    if get_origin(annotation) in (Union, UnionType):
        return any(_fits(value, part) for part in get_args(annotation))
    kind = get_origin(annotation) or annotation
    if kind is Any or not isinstance(kind, type):  # postponed annotations are strings
        return True
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind in (list, set, tuple):
        item_types = [part for part in get_args(annotation) if part is not Ellipsis]
        item_type = item_types[0] if len(set(item_types)) == 1 else Any
        return isinstance(value, list | set | frozenset | tuple) and all(_fits(item, item_type) for item in value)
    return isinstance(value, kind)


def _words_for(annotation: Any) -> str:
    """Return an annotated type in words, for error messages."""
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(_words_for, get_args(annotation))))
    kind = get_origin(annotation) or annotation
    words = {int: "an integer", float: "a number", bool: "True or False", str: "a string", type(None): "None"}
    if kind in (list, set, tuple):
        plural = {int: "integers", float: "numbers", str: "strings"}
        items = {plural[part] for part in get_args(annotation) if part in plural}
        return f"a list of {items.pop()}" if len(items) == 1 else "a list"
    return (words | {dict: "a dictionary"}).get(kind, getattr(kind, "__name__", str(kind)))


def parsed_json(content: bytes) -> Any:
    """Return the value of a JSON document.

    Raises:
        ValueError: For anything beyond the JSON standard, such as NaN, duplicate keys or endless nesting.
    """

    def refuse(word: str) -> Any:
        raise ValueError(f"{word} is not a JSON number")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            raise ValueError("a key is given twice")
        return values

    try:
        return json.loads(content, parse_constant=refuse, object_pairs_hook=unique)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _get_commit_hash(pkg_name: str) -> str | None:
    """Return the commit from which a distribution was installed; None if it was not installed from a repository."""
    try:
        text = importlib.metadata.distribution(pkg_name).read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return None
    return None if text is None else json.loads(text).get("vcs_info", {}).get("commit_id")


def _format_version() -> str:
    """Return the `peft_version` of a new configuration. That of a development version names the commit, as in PEFT."""
    if "dev" not in __version__:
        return __version__
    try:
        commit = _get_commit_hash("peftcore")
    except Exception as error:  # the installation's metadata may be damaged, and a configuration does not need it
        warnings.warn(f"peft_version names no commit, because it cannot be found: {error!r}", stacklevel=2)
        commit = None
    return f"{__version__}@{commit or 'UNKNOWN'}"


class SharedOptions:
    """Options that only some methods support, with the values that all other methods have.

    The options are plain class attributes, so they can be read from every configuration. A method that supports an
    option declares a dataclass field of the same name. Only then can the option be set and is it saved.
    """

    bias: str = "none"
    """Trained biases of the base model: "none", "all", or "METHOD_only" for the biases of the adapted layers."""
    modules_to_save: list[str] | None = None
    """Modules that train in full, one copy per adapter, and are saved with the adapter."""
    layer_replication: list[tuple[int, int]] | None = None
    """Ranges of blocks, such as [(0, 4), (2, 5)], of which the deeper model consists; blocks share base weights."""
    target_parameters: list[str] | None = None
    """Path suffixes of raw parameters to adapt, such as "experts.gate_up_proj": (experts, ...) or (out, in)."""
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    """Token ids whose embedding rows are trained in full; {path suffix: ids} for other embeddings."""
    ensure_weight_tying: bool = False
    """Adapt or copy both layers of a tied pair of weights in the same way, so that they stay tied."""


class _ConfigType(type):
    """Class of the configuration classes: leaves out arguments without effect, and knows HF PEFT's base classes."""

    if not TYPE_CHECKING:  # a type checker reads the arguments from the fields

        def __call__(cls, *args: Any, **options: Any) -> Any:
            """Create a configuration, without the keys of `ignored_on_disk` that are at their default or empty.

            So `LoraConfig(**fields)` takes the fields of a file that HF PEFT wrote. Other values stay an error.
            """
            without_effect = cls.ignored_on_disk
            kept = {k: v for k, v in options.items() if k not in without_effect or (v and v != without_effect[k])}
            return super().__call__(*args, **kept)

        @property
        def __signature__(cls) -> inspect.Signature:
            """Return the arguments by name, because libraries ask `inspect.signature` which options a method has."""
            init = inspect.signature(cls.__init__)
            return init.replace(parameters=list(init.parameters.values())[1:], return_annotation=cls)

        def __instancecheck__(cls, instance: Any) -> bool:
            return super().__instancecheck__(instance) or cls.__subclasscheck__(type(instance))

        def __subclasscheck__(cls, subclass: type) -> bool:
            """Return whether the class derives from this one, here or in HF PEFT (`derives_from`)."""
            if super().__subclasscheck__(subclass):
                return True
            method = vars(cls).get("method", "")  # a subclass that a script defines inherits it, so it has ""
            return method != "" and method == getattr(subclass, "derives_from", "")


@dataclass
class PeftConfig(SharedOptions, metaclass=_ConfigType):
    """Base of every adapter configuration. Field names are those of PEFT's `adapter_config.json`.

    The core reads a method's properties from the class variables and from the methods under "hooks". So the core has no
    code for single methods.
    """

    method: ClassVar[str] = ""
    """The value of `peft_type`, a plain string for messages: text of a `PeftType` is "PeftType.LORA"."""
    derives_from: ClassVar[str] = ""
    """Method whose configuration class is the base class in HF PEFT; `isinstance` and `issubclass` answer as there."""
    has_schedule: ClassVar[bool] = False
    """True if training follows a schedule over one whole run; a finished adapter then cannot be trained further."""
    ignored_on_disk: ClassVar[dict[str, Any]] = {}
    """{key that PEFT writes for this method: value at which the key has no effect}."""
    not_saved: ClassVar[tuple[str, ...]] = ()
    """Fields that are options of the running program and are never saved."""
    not_saved_if_none: ClassVar[tuple[str, ...]] = ()
    """Fields that are saved only with a value, because HF PEFT's class of the method lacks them."""
    not_shown: ClassVar[frozenset[str]] = frozenset({"bias", "fan_in_fan_out", "inference_mode"})
    """Options that the printed adapters of a model leave out."""
    size_fields: ClassVar[tuple[str, ...]] = ()
    """Fields with integers (or {pattern: integer}) that never exceed the largest dimension of the saved tensors.

    Loading checks them before it allocates memory."""

    task_type: TaskType | str | None = None
    """The model's task, such as "CAUSAL_LM"; None if no task's class is needed."""
    peft_type: PeftType | str = ""
    """Name of the method on disk, such as "LORA". The class decides it; a plain string for third-party methods."""
    base_model_name_or_path: str | None = None
    """Name or path of the base model, written when the adapter is saved."""
    revision: str | None = None
    """Revision of the base model on the hub."""
    inference_mode: bool = False
    """True: the adapter is frozen when it is added."""
    auto_mapping: dict[str, Any] | None = None
    """Class of a base model without a task, for `AutoPeftModel`."""
    peft_version: str | None = None
    """Version of HF PEFT that knows the file; None for the version whose format is written here."""
    extra: dict[str, Any] = field(default_factory=dict, repr=False)
    """Keys read from disk that this version does not know; saved unchanged."""

    def __new__(cls, *_args: Any, **options: Any) -> Self:
        """Refuse unknown options; the error suggests a similar name."""
        field_names = [f.name for f in dataclasses.fields(cls)]
        for key in options:
            if key not in field_names:
                options_of_users = [name for name in field_names if name != "extra"]
                raise UnknownOptionError(f"{cls.__name__}: unknown option {key!r}{suggestion(key, options_of_users)}")
        return object.__new__(cls)

    def __post_init__(self) -> None:
        self._check_types()
        if self.peft_type not in ("", kind := type(self).peft_type):
            warnings.warn(
                f"{type(self).__name__}: peft_type={self.peft_type!r} has no effect, because the class has the method "
                f"{self.method!r}; leave it out",
                stacklevel=4,
            )
        self.peft_type = kind
        if self.peft_version is None:
            self.peft_version = _format_version()
        if self.task_type is not None:
            self.task_type = self.one_of("task_type", self.task_type, TaskType)

    def __getattr__(self, name: str) -> Any:
        """Return the value of an option of HF PEFT's class that has no effect here, such as `megatron_core`."""
        without_effect = type(self).ignored_on_disk
        if name not in without_effect:
            raise AttributeError(f"{type(self).__name__} has no option {name!r}")
        return copy.copy(without_effect[name])

    # -- hooks -----------------------------------------------------------------------------------------------

    @classmethod
    def schedule_options(cls, total_steps: int, warmup_share: float, final_share: float) -> dict[str, Any]:
        """Return the options that fit the method's schedule to a training run; {} for methods without a schedule.

        Args:
            total_steps: Optimiser steps of the whole run.
            warmup_share: Share of the steps before the schedule begins.
            final_share: Share of the steps after the schedule has ended.
        """
        return {}

    @property
    def replaces_base(self) -> bool:
        """True if the initialisation replaces weights of the base."""
        return False

    @property
    def needs_data(self) -> bool:
        """True if the initialisation needs data: `peftcore.initialize_from_data` has to be called."""
        return False

    @property
    def trains_single_rows(self) -> bool:
        """True if the adapter trains single rows of embeddings, so `save_embedding_layers` may omit the embedding."""
        return self.trainable_token_indices is not None

    def sizes(self) -> dict[str, int]:
        """Return {name of a size: its value} for the `size_fields`, entries of patterns included."""
        sizes: dict[str, int] = {}
        for name in self.size_fields:
            value = vars(self).get(name)
            entries = (
                {f"{name}[{key!r}]": size for key, size in value.items()} if isinstance(value, dict) else {name: value}
            )
            sizes |= {key: size for key, size in entries.items() if isinstance(size, int)}
        return sizes

    def ranks(self) -> list[int]:
        """Return the ranks (counts) that the configuration states; [] for methods without a stated rank."""
        return []

    def token_configs(self) -> list[Any]:
        """Return configurations of the adapters of embedding rows that belong to this adapter."""
        return []

    def beyond_low_rank(self) -> str:
        """Return the reason why products of two factors cannot express the adapter; "" if they can."""
        return ""

    def take_factors(self, tensors: "dict[str, Tensor]") -> "dict[str, Factors] | None":
        """Return {path: factors of ΔW} of a saved adapter, without its model; None if the model is needed.

        Args:
            tensors: {path and suffix: tensor} of the directory; the adapter's own tensors are removed.
        """
        return None

    def without_effect(self) -> dict[str, str]:
        """Return {option that has a value: the setting without which the option has no effect}."""
        return {}

    def can_be_overwritten_by(self, other: "PeftConfig") -> bool:
        """Return True if an adapter with configuration `other` has tensors of the same names, shapes and meaning."""
        return False

    def check_beside(self, other: "PeftConfig") -> None:
        """Raise ConfigError if a model cannot have this adapter and another one at the same time.

        Called if `restricts_others`, when this adapter or the other one is made for a model that has one.
        """

    @property
    def restricts_others(self) -> bool:
        """True if `check_beside` refuses some other adapters."""
        return False

    def check_complete(self) -> None:
        """Raise ConfigError if a required option has no value; called when an adapter is created.

        Options may also be assigned after the configuration was created, as with HF PEFT.
        """

    # -- checks shared by the methods' configurations ---------------------------------------------------------

    def _check_types(self) -> None:
        for field_ in dataclasses.fields(self):
            value = getattr(self, field_.name)
            if value is None and field_.type is bool:  # as HF PEFT reads it; Axolotl gives None for unset options
                value = False
                setattr(self, field_.name, value)
            if not _fits(value, field_.type):
                raise OptionTypeError(
                    f"{type(self).__name__}: {field_.name} must be {_words_for(field_.type)}; got {value!r:.200}"
                )
            if field_.name.endswith("_pattern") and isinstance(value, dict):
                self._check_pattern(field_.name, value, field_.type)

    def _check_pattern(self, name: str, pattern: dict[str, Any], annotation: Any) -> None:
        value_type = next((get_args(part)[1] for part in get_args(annotation) if get_origin(part) is dict), Any)
        for key, value in pattern.items():
            self.regular_expression(name, key, SEGMENTS)
            is_rank = name == "rank_pattern" and value_type is int
            if not _fits(value, value_type) or (is_rank and value < 1):
                kind = "a positive integer" if is_rank else _words_for(value_type)
                raise ConfigError(f"{type(self).__name__}: {name}[{key!r}] must be {kind}; got {value!r:.200}")
        if len(pattern) > _MOST_PATTERNS and sum(map(branches, pattern)) > _MOST_PATTERNS:
            raise ConfigError(
                f"{type(self).__name__}: {name} holds more than {_MOST_PATTERNS} regular expressions; name the modules"
            )

    def regular_expression(self, name: str, text: str, before: str = "", after: str = "") -> None:
        """Check that `text`, from the field `name`, is a regular expression, also between `before` and `after`.

        Raises:
            ConfigError: If the text is not a regular expression.
        """
        try:
            compiled(text, before, after)
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"{type(self).__name__}: {name} {text!r:.200} is not a regular expression ({error}); "
                "give a list of names"
            ) from error

    def one_of(self, name: str, value: Any, choices: Any) -> Any:
        """Return `value` if it is one of `choices`.

        Raises:
            OptionChoiceError: For any other value; the message lists the choices.
        """
        if value not in list(choices):
            fits = ", ".join(repr(getattr(choice, "value", choice)) for choice in choices)
            raise OptionChoiceError(f"{type(self).__name__}: {name} must be one of {fits}; got {value!r}")
        return TaskType(value) if choices is TaskType else value

    def positive(self, *names: str) -> None:
        """Raise ConfigError unless each named field is an integer of at least 1."""
        for name in names:
            value = getattr(self, name)
            is_integer = isinstance(value, int) and not isinstance(value, bool)
            if not is_integer or value < 1:
                error = ConfigError if is_integer else OptionTypeError
                raise error(f"{type(self).__name__}: {name} must be a positive integer; got {value!r}; try 8")

    def probability(self, *names: str) -> None:
        """Raise ConfigError unless each named field is in [0, 1)."""
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value < 1:
                raise ConfigError(f"{type(self).__name__}: {name} must be at least 0 and below 1; got {value!r}")

    def _warn_of_unsaved(self, tensors: str, seed: str) -> None:
        """Warn if `save_projection` is False, as HF PEFT does.

        Args:
            tensors: The tensors that are not saved then.
            seed: Name of the option from which loading draws the tensors again.
        """
        if not vars(self)["save_projection"]:
            warnings.warn(
                f"Specified to not save {tensors}: loading draws them again from "
                f"`config.{seed}`, and another version of PyTorch may draw other numbers; set `save_projection=True` "
                "to save them",
                stacklevel=5,
            )

    # -- JSON ------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Return all fields and `peft_type` as JSON types; sets become sorted lists. Unknown keys stay in `extra`.

        Options of HF PEFT that have no effect here are among them, with their defaults.
        """
        names = [f.name for f in dataclasses.fields(self) if f.name not in ("extra", *self.not_saved)]
        values = {name: getattr(self, name) for name in names}
        own = {k: sorted(v) if isinstance(v, set | frozenset) else v for k, v in values.items()}
        return {**copy.deepcopy(type(self).ignored_on_disk), **own}

    def to_json(self) -> str:
        """Return the text of `adapter_config.json`, with the unknown keys that were read from disk."""
        values = {k: v for k, v in self.to_dict().items() if v is not None or k not in self.not_saved_if_none}
        return json.dumps({**values, **self.extra}, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_dict(cls, values: dict[str, Any], from_disk: bool = False) -> "PeftConfig":
        """Return a configuration of the class that `peft_type` names; of this class if `peft_type` is absent.

        Args:
            values: Fields of the configuration.
            from_disk: True keeps unknown keys and warns about them; False makes them a ConfigError.

        Raises:
            ConfigError: For an unknown method, a misspelt key or a value that does not fit.
        """
        values = dict(values)
        named = values.pop("peft_type", None)
        method = named or cls.peft_type
        if not method or not isinstance(method, str):
            raise UnknownMethodError(
                f"configuration without peft_type, or with one that is not a name: {method!r}; try 'LORA'"
            )
        target = method_named(method if method in methods() else method.upper()).config.class_for(values)
        if not from_disk:
            return target(**values)
        for name in target.not_saved:
            if values.pop(name, None) is not None:
                message = f"{CONFIG_NAME}: {name} is ignored, because it concerns the running program only"
                warnings.warn(message, stacklevel=4)
        field_names = {f.name for f in dataclasses.fields(target)}
        extra = {k: v for k, v in values.items() if k not in field_names}
        if extra and not named:
            raise UnknownOptionError(
                f"{CONFIG_NAME} has no peft_type, and {next(iter(extra))!r} is no field of {target.__name__}; it is "
                "not the configuration of an adapter"
            )
        target._refuse_other_mathematics(extra)
        target.check_saved(values)
        config = target(**{k: v for k, v in values.items() if k in field_names})
        config.extra = {key: value for key, value in extra.items() if key not in target.ignored_on_disk}
        return config

    @classmethod
    def class_for(cls, keys: Collection[str]) -> type["PeftConfig"]:
        """Return the configuration class that has these keys: `cls`, or one that extends its method."""
        return cls

    @classmethod
    def check_saved(cls, values: Mapping[str, Any]) -> None:
        """Refuse or warn of a saved configuration of an older version of HF PEFT that computed something else.

        Args:
            values: The fields in the file. HF PEFT writes `peft_version` since 0.18.

        Raises:
            ConfigError: The adapter cannot be read.
        """

    @classmethod
    def _refuse_other_mathematics(cls, extra: dict[str, Any]) -> None:
        for key, value in extra.items():
            if value and value != cls.ignored_on_disk.get(key, value):
                raise ConfigError(
                    f"{CONFIG_NAME}: {key}={value!r} is not supported by {cls.method} here, and ignoring it would "
                    "change the results; merge that adapter with the library that made it"
                )
        if unknown := sorted(key for key, value in extra.items() if value and key not in cls.ignored_on_disk):
            warnings.warn(
                f"{CONFIG_NAME}: unknown to this version: {', '.join(map(repr, unknown))}; kept, without effect",
                stacklevel=5,
            )

    @property
    def is_prompt_learning(self) -> bool:
        """True for prompts, prefixes and their encoders: methods of virtual tokens."""
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        """True for adaption prompts."""
        return self.peft_type == "ADAPTION_PROMPT"

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> "PeftConfig":
        """Return the configuration of a saved adapter.

        Args:
            pretrained_model_name_or_path: A directory, or a hub id such as "owner/name".
            subfolder: Folder of the adapter inside of the directory or repository.
            kwargs: Options of a download: `revision`, `token`, `cache_dir`, `force_download`, `local_files_only` and
                the others of `huggingface_hub.hf_hub_download`.

                Fields of the configuration do not override the file, as in HF PEFT: a value that differs from the
                file's is a warning. `trust_remote_code=True` is one too, because a configuration of an adapter has no
                code.

        Raises:
            CheckpointError: If `adapter_config.json` is absent or not valid JSON, or cannot be downloaded.
            ConfigError: If a value does not fit.
            TypeError: For an unknown option.
        """
        if kwargs.pop("trust_remote_code", None):
            warnings.warn(
                "PeftConfig.from_pretrained: trust_remote_code has no effect, because an adapter's configuration has "
                "no code; give it to the base model's from_pretrained",
                stacklevel=2,
            )
        options, others = hub.split_options(kwargs)
        directory = hub.adapter_directory(
            pretrained_model_name_or_path, needs_weights=False, subfolder=subfolder, **options
        )
        with hub.naming_download(pretrained_model_name_or_path):
            config = cls._from_directory(directory)
        function, field_names = f"{cls.__name__}.from_pretrained", {field.name for field in dataclasses.fields(config)}
        hub.checked_options(function, {name: value for name, value in others.items() if name not in field_names})
        for name, value in others.items():
            if value != getattr(config, name, None):
                warnings.warn(
                    f"{function}: {name}={value!r} has no effect, because {CONFIG_NAME} says "
                    f"{getattr(config, name, None)!r}; assign it to the result: config.{name} = {value!r}",
                    stacklevel=2,
                )
        return config

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> "PeftConfig":
        """Return a configuration of the class that `peft_type` names; of this class if `peft_type` is absent.

        Args:
            kwargs: Fields of the configuration.

        Raises:
            ConfigError: For an unknown method, a misspelt key or a value that does not fit.
        """
        return cls.from_dict(kwargs)

    @classmethod
    def _from_directory(cls, directory: Path) -> "PeftConfig":
        path = whole_files(directory) / CONFIG_NAME
        if not path.is_file():
            raise CheckpointError(f"no {CONFIG_NAME} in {directory}; give the directory that save_pretrained wrote")
        return cls.from_dict(cls.from_json_file(path), from_disk=True)

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike[str]) -> dict[str, Any]:
        """Return the fields in a file, without `runtime_config`, whose options are for one process.

        Args:
            path_json_file: An `adapter_config.json`.

        Raises:
            CheckpointError: If the file is not valid JSON, or holds something else than fields.
        """
        path = Path(path_json_file)
        try:
            values = parsed_json(read_limited(path, LARGEST_CONFIG))
        except ValueError as error:
            raise CheckpointError(f"{path} is not valid JSON ({error}); the file is damaged") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"{path} holds a {type(values).__name__}, not the fields of a configuration")
        if values.pop("runtime_config", None):
            warnings.warn(f"{path}: runtime_config is not read; assign it to the configuration", stacklevel=5)
        return {**dict.fromkeys(cls.not_saved_if_none), **values}

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write `adapter_config.json` into a directory, atomically.

        Args:
            save_directory: The directory; created if it does not exist.
            kwargs: `auto_mapping_dict`: the value of `auto_mapping` in the file; None for the configuration's own.

        Raises:
            CheckpointError: If `save_directory` is a file.
            TypeError: For an unknown option.
        """
        auto_mapping_dict = kwargs.pop("auto_mapping_dict", None)
        if kwargs:
            raise TypeError(
                f"{type(self).__name__}.save_pretrained() has no option {next(iter(kwargs))!r}; push_to_hub is a "
                "method of its own"
            )
        directory = Path(save_directory)
        if directory.is_file():
            raise CheckpointError(f"{directory} is a file; give a directory to save the configuration in")
        written = self if auto_mapping_dict is None else dataclasses.replace(self, auto_mapping=auto_mapping_dict)
        write_atomically(directory / CONFIG_NAME, written.to_json())

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str | None = "50GB",
        tags: list[str] | None = None,
    ) -> Any:
        """Upload `adapter_config.json` to a repository of the hub, in one commit.

        Args:
            repo_id: "name" or "owner/name"; created if it does not exist.
            commit_message: First line of the commit's message; None for "Upload config".
            commit_description: The rest of the message.
            private: True for a private repository, if it is new; None for the owner's default.
            token: A token; None for the stored one.
            revision: Branch to commit to, created if it does not exist.
            create_pr: True opens a pull request in place of a commit.
            max_shard_size: Only the default, because a configuration is one file.
            tags: Tags to add to the repository's model card.

        Returns:
            `huggingface_hub.CommitInfo`: a string, the commit's URL.

        Raises:
            CheckpointError: If the hub refuses the upload or cannot be reached.
        """
        return hub.push(
            repo_id,
            self.save_pretrained,
            max_shard_size=max_shard_size,
            commit_message=commit_message or "Upload config",
            commit_description=commit_description,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            tags=tags,
        )


@dataclass
class PromptLearningConfig(PeftConfig):
    """Base configuration of prompt methods. Sizes that are None are taken from the model."""

    size_fields: ClassVar[tuple[str, ...]] = ("num_virtual_tokens",)

    num_virtual_tokens: int | None = None
    """Length of the prompt or prefix (count)."""
    token_dim: int | None = None
    """Size of a virtual token's embedding."""
    num_transformer_submodules: int | None = None
    """2: one prompt for the encoder and one for the decoder."""
    num_attention_heads: int | None = None
    """Heads of a prefix's keys; None: the model's."""
    num_layers: int | None = None
    """Layers that get a prefix (count); None: the model's."""
    modules_to_save: list[str] | None = None
    """Modules that train in full, one copy per adapter, and are saved with the adapter."""

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = ("num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers")
        self.positive(*(name for name in sizes if getattr(self, name) is not None))

    @property
    def is_prompt_learning(self) -> bool:
        """True: the method learns virtual tokens."""
        return True

    def check_complete(self) -> None:
        """Check that the prompt has tokens."""
        self.positive("num_virtual_tokens")


@dataclass
class TunerConfig(PeftConfig):
    """Base configuration of methods that adapt layers: the layers, and the further modules that train."""

    size_fields: ClassVar[tuple[str, ...]] = ("r", "rank_pattern")

    target_modules: list[str] | set[str] | str | None = None
    """Path suffixes, a regular expression for whole paths, or "all-linear"; None: the architecture's default."""
    exclude_modules: list[str] | set[str] | str | None = None
    """Targets to leave out: path suffixes, or a regular expression for whole paths."""
    modules_to_save: list[str] | None = None
    """Modules that train in full, one copy per adapter, and are saved with the adapter."""
    layers_to_transform: list[int] | int | None = None
    """Indices of the blocks whose targets are adapted; None: all blocks. A whole path in target_modules always is."""
    layers_pattern: list[str] | str | None = None
    """Name of the block list that layers_to_transform indexes, such as "layers"; None: derived from the path."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str):
                self.regular_expression(name, value)
            elif value is not None:
                setattr(self, name, set(value))
        for pattern in [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern or []:
            self.regular_expression("layers_pattern", pattern, *BLOCK)
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError(f"{type(self).__name__}: layers_pattern needs layers_to_transform; give both or neither")

    def check_complete(self) -> None:
        """Check that the targets are not empty."""
        if self.target_modules is not None and not self.target_modules and not self.target_parameters:
            raise ConfigError(f"{type(self).__name__}: target_modules is empty; name a layer or use 'all-linear'")

    def naming_targets(self, paths: Iterable[str]) -> Self:
        """Return a copy whose targets are these paths, without the options that choose among the layers.

        For files of methods that lack such an option in HF PEFT.

        Args:
            paths: Paths of the adapted layers.
        """
        return dataclasses.replace(
            self, target_modules=set(paths), exclude_modules=None, layers_to_transform=None, layers_pattern=None
        )


@dataclass
class RandomProjectionConfig(TunerConfig):
    """Base configuration of methods whose layers share random frozen projections, drawn from a seed."""

    projection_prng_key: int = 0
    """Seed of the projections."""
    save_projection: bool = True
    """False omits the projections from the directory; loading then draws them again from the seed."""
    init_weights: bool = True
    """True: the adapter starts at zero; False: random, for tests."""
    fan_in_fan_out: bool = False
    """Read and saved for PEFT; without effect, because the orientation is found per layer."""


_STEMS = {"rank_pattern": "r"}
"""{pattern field: option}, for patterns that are not named after the option."""


def options_at(config: PeftConfig, path: str = "") -> dict[str, bool | int | float | str]:
    """Return the options to print for the layer `path`: numbers other than zero, and values other than the default."""
    inherited = {option.name for kind in (PeftConfig, TunerConfig) for option in dataclasses.fields(kind)}
    shown: dict[str, bool | int | float | str] = {}
    for option in dataclasses.fields(config):
        value = getattr(config, option.name)
        if option.name in inherited | config.not_shown or not isinstance(value, bool | int | float | str):
            continue
        for pattern in (name for name in vars(config) if name.endswith("_pattern")):
            stem = _STEMS.get(pattern, pattern.removesuffix("_pattern"))
            if option.name == stem or (len(stem) > 1 and option.name.endswith(f"_{stem}")):
                value = first_match(getattr(config, pattern), path, value)
        is_nonzero_number = not isinstance(value, bool | str) and value != 0
        if is_nonzero_number or value != option.default:
            shown[option.name] = value
    return shown
