"""Translates the configuration file of another training tool to values of `params.yaml`.

A tool is a table of rules, one for each of its keys. Each key of a file ends in one of four places. It is translated;
it is translated with a note of what differs; it has no effect on the trained weights and is left out; or it changes the
training and has no counterpart. The last is an error, unless the user says which of these keys to leave out.
"""

import difflib
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from flows.errors import ParamsError

BASE, DATA, TASK = "base", "data", "task"
"""Keys of a rule's values that are fields of `NewProject` and no parameters."""
SAME_ENDS = "the base's own stay; leave this out if they are the same, or save a tokenizer with them (path:FOLDER)"
PLAIN_LORA = {"method.name": "lora", "method.init": "default"}
"""LoRA with its usual start, as the other tools have it."""
FULL_FINE_TUNING = "peftcore trains adapters; for full fine-tuning of a model stay with {tool}"


class NoCounterpart(Exception):
    """A value that changes the training and that params.yaml cannot express; the text says what to do."""


class Values(dict[str, Any]):
    """{section.key of params.yaml: value}, and what differs from the other tool although the value is translated."""

    def __init__(self, values: Mapping[str, Any] = {}, note: str = ""):
        super().__init__(values)
        self.note = note


class Config(NamedTuple):
    """A configuration file of another tool."""

    values: Mapping[str, Any]
    """The file's keys, with the tool's defaults where they differ from those of params.yaml."""
    folder: Path
    """The file's folder."""

    def place(self, path: str) -> Path:
        """Return what a path in the file names: from the file's folder, or else from the current one."""
        beside = (self.folder / Path(path).expanduser()).resolve()
        return beside if beside.exists() else Path(path).expanduser().resolve()


Rule = str | tuple[str, Mapping[Any, Any]] | Callable[[Any, Config], Mapping[str, Any]]
"""A key of params.yaml with the same values; such a key and {their value: ours}; or a function of value and file."""


@dataclass(frozen=True)
class Tool:
    """Another training tool, as a table of its keys."""

    name: str
    defaults: Mapping[str, Any]
    """Values of keys that a file leaves out, where they differ from the defaults of params.yaml."""
    rules: Mapping[str, Rule]
    sources: Mapping[str, Collection[str]]
    """{base or data: keys that name it}"""
    no_effect: Mapping[str, str]
    """{pattern of keys: why these keys do not change the trained weights}"""


@dataclass
class Translation:
    """Result of translating a file: values of params.yaml, and a reason for each key that gives none."""

    values: dict[str, Any] = field(default_factory=dict)
    """{section.key: value}"""
    project: dict[str, str] = field(default_factory=dict)
    """Those of base, data and task that the file gives."""
    keys: dict[str, list[str]] = field(default_factory=dict)
    """{their key: the keys of params.yaml that it sets}"""
    notes: dict[str, str] = field(default_factory=dict)
    """{their key: what differs}"""
    without_effect: dict[str, str] = field(default_factory=dict)
    """{their key: why nothing changes without it}"""
    missing: dict[str, str] = field(default_factory=dict)
    """{their key: why it has no counterpart}"""


def read_config(file: Path) -> dict[str, Any]:
    """Return the mapping in a YAML or JSON file.

    Raises:
        ParamsError: There is no such file, or it is no mapping.
    """
    try:
        values = YAML(typ="safe").load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ParamsError(f"{file} cannot be read: {error}") from error
    except YAMLError as error:
        raise ParamsError(f"{file} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ParamsError(f"{file} must be a mapping of keys to values, as the tool's own configuration files are")
    return values


def translate(tool: Tool, file: Path, given: Collection[str] = ()) -> Translation:
    """Translate a file; nothing is written, and a key without counterpart is in the result's `missing`.

    Args:
        tool: The tool that the file is for.
        file: A YAML or JSON file.
        given: Which of base and data the user gives; the file's keys for these are not read.

    Raises:
        ParamsError: The file cannot be read, or a value has another type than the tool gives it.
    """
    own = read_config(file)
    config = Config({**tool.defaults, **own}, file.resolve().parent)
    replaced = {key for name in given for key in tool.sources[name]}
    result = Translation()
    for key, value in config.values.items():
        rule = tool.rules.get(key)
        if value is None or (rule is None and _is_off(value)):
            continue
        if key in replaced:
            result.without_effect[key] = "another one is given"
            continue
        if rule is None:
            reason = next((why for pattern, why in tool.no_effect.items() if re.fullmatch(pattern, key)), None)
            if reason is not None:
                result.without_effect[key] = reason
            else:
                near = difflib.get_close_matches(key, tool.rules, n=1, cutoff=0.8)
                result.missing[key] = f"did you mean {near[0]}?" if near else "this key is not known here"
            continue
        try:
            values = _apply(rule, value, config)
        except NoCounterpart as reason:
            result.missing[key] = str(reason)
            continue
        except (TypeError, ValueError, AttributeError) as error:
            raise ParamsError(f"{file}: {key}: {value!r} cannot be read: {error}") from error
        note = values.note if isinstance(values, Values) else ""
        if note:
            result.notes[key] = note
        parameters = {name: value for name, value in values.items() if name not in (BASE, DATA, TASK)}
        result.project |= {name: values[name] for name in (BASE, DATA, TASK) if name in values}
        result.values |= parameters
        if key in own:
            result.keys[key] = [*values]
    return result


def check_missing(tool: Tool, file: Path, translation: Translation, leave_out: Collection[str]) -> None:
    """Check that the user has agreed to leave out each key that changes the training and has no counterpart.

    Args:
        tool: The tool that the file is for.
        file: The file that was translated.
        translation: What became of it.
        leave_out: Keys that the user leaves out.

    Raises:
        ParamsError: A key is in the file and not in `leave_out`; the text names all of them. Or `leave_out` has a key
            that is not missing.
    """
    if unknown := [key for key in leave_out if key not in translation.missing]:
        raise ParamsError(f"--leave-out {', '.join(unknown)}: {file} has no such key that lacks a counterpart")
    open_keys = {key: text for key, text in translation.missing.items() if key not in leave_out}
    if open_keys:
        lines = "".join(f"\n  {key}: {text}" for key, text in open_keys.items())
        options = " ".join(f"--leave-out {key}" for key in open_keys)
        raise ParamsError(
            f"{file} has keys that change the training and have no counterpart here:{lines}\n"
            f"to go on without them, add {options}"
        )


def _apply(rule: Rule, value: Any, config: Config) -> Mapping[str, Any]:
    if isinstance(rule, str):
        return {rule: value}
    if isinstance(rule, tuple):
        key, values = rule
        if not isinstance(value, str | int | float | bool) or value not in values:
            raise NoCounterpart(f"{value!r}; {', '.join(map(str, values))} have one")
        return {key: values[value]}
    return rule(value, config)


def _is_off(value: Any) -> bool:
    """Return True for a value that switches an option off; the number 0 may be a setting."""
    return value is False or value in ("", [], {})


# -- rules that several tools share ----------------------------------------------------------------------------------


def base_of(source: str, config: Config, revision: str | None = None) -> Mapping[str, Any]:
    """Return the base model: a folder if there is one, else a name on the hub."""
    if (folder := config.place(source)).is_dir():
        return {BASE: f"path:{folder}"}
    return {BASE: f"hub:{source}" + (f"@{revision}" if revision else "")}


def data_of(source: str, config: Config) -> Mapping[str, Any]:
    """Return the training data: a file or folder if there is one, else a name on the hub."""
    return {DATA: str(place) if (place := config.place(source)).exists() else f"hub:{source}"}


def number(value: Any, _: Config | None = None) -> float:
    """Return a number; YAML reads 1e-4 as text."""
    return float(value)


def as_number(key: str) -> Rule:
    """Return the rule of a number that has the same meaning."""
    return lambda value, _: {key: number(value)}


def only(expected: Any, advice: str) -> Rule:
    """Return the rule of a key that may have one value only, the one that peftcore acts by anyway."""

    def rule(value: Any, _: Config) -> Mapping[str, Any]:
        if value != expected:
            raise NoCounterpart(advice)
        return {}

    return rule


def never(advice: str) -> Rule:
    """Return the rule of a key that has no counterpart unless its value switches it off."""

    def rule(value: Any, _: Config) -> Mapping[str, Any]:
        if not _is_off(value):
            raise NoCounterpart(advice)
        return {}

    return rule


def noted(note: str) -> Rule:
    """Return the rule of a key that needs no parameter, with what differs."""
    return lambda value, _: Values({}, "" if _is_off(value) else note)


def switched_on(key: str, value_if_on: Any) -> Rule:
    """Return the rule of a switch: on gives `key` a value, off leaves it alone."""
    return lambda value, _: {} if _is_off(value) else {key: value_if_on}


def bfloat16(value: Any, _: Config) -> Mapping[str, Any]:
    """Return the type of the products; "auto" takes bfloat16 where the device multiplies it fast, as in Axolotl."""
    return {} if _is_off(value) else {"quantization.compute_dtype": "auto" if value == "auto" else "bfloat16"}


def warmup_steps(steps: Any, _: Config) -> Mapping[str, Any]:
    """Return the number of warm-up steps; a number below 1 is a share of the steps."""
    steps = number(steps)
    return {"train.warmup_share": steps} if steps < 1 else {"train.warmup_steps": int(steps)}


def optimizer(name: str, _: Config) -> Mapping[str, Any]:
    """Return the optimiser of one of transformers' names."""
    if name == "adamw_torch_8bit":
        return Values({"train.optimizer": "adamw_8bit"}, "8-bit AdamW of bitsandbytes, and not of torchao")
    if name not in OPTIMIZERS:
        raise NoCounterpart(f"{name!r}; {', '.join(OPTIMIZERS)} and adamw_torch_8bit have one")
    return {"train.optimizer": OPTIMIZERS[name]}


def validation(size: Any, _: Config) -> Mapping[str, Any]:
    """Return the size of the validation split: a share below 1, else a number of rows."""
    size = number(size)
    if not size:
        return Values({}, "a validation split is always made; data.validation_share and data.test_share are its sizes")
    return {"data.validation_share": size} if size < 1 else {"data.validation_rows": int(size)}


OPTIMIZERS = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw"), "adamw"),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit"), "adamw_8bit"),
    **dict.fromkeys(("paged_adamw", "paged_adamw_32bit"), "paged_adamw"),
    "paged_adamw_8bit": "paged_adamw_8bit",
}
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant"}
ADAM = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}
TRAINING: Mapping[str, Rule] = {
    "gradient_accumulation_steps": "train.gradient_accumulation",
    "learning_rate": as_number("train.learning_rate"),
    "weight_decay": as_number("train.weight_decay"),
    "max_grad_norm": as_number("train.max_grad_norm"),
    "warmup_ratio": as_number("train.warmup_share"),
    "warmup_steps": warmup_steps,
    "max_steps": lambda value, _: {"train.max_steps": value} if value > 0 else {},
    "seed": "project.seed",
    "save_total_limit": "train.save_checkpoints",
    "bf16": bfloat16,
    "fp16": switched_on("quantization.compute_dtype", "float16"),
    "trust_remote_code": noted("code from the hub is never run; the base must be a model class of transformers"),
    "neftune_noise_alpha": never("noise on the embeddings is not built"),
    "loraplus_lr_ratio": never("the pipeline has one learning rate; peftcore.create_loraplus_optimizer has two"),
    **{
        key: only(value, f"the pipeline's AdamW has {key} {value}")
        for key, value in ADAM.items()
    },
}  # fmt: skip
"""Rules of keys of transformers' TrainingArguments."""

NO_EFFECT: Mapping[str, str] = {
    r"output_dir|hub_\w+|push_\w+|overwrite_\w+": "versions are kept in the registry",
    r"logging_\w+|log_\w+|report_to|run_name|include_\w+|plot_loss": "only what is logged",
    r"wandb_\w+|use_wandb|swanlab_\w+|use_swanlab|mlflow_\w+|comet_\w+|trackio_\w+|use_tensorboard": (
        "only what is logged"
    ),
    r"save_\w+|saves_per_epoch|resume_from_checkpoint|auto_resume_from_checkpoints|load_best_model_at_end": (
        "checkpoints are written and resumed by themselves, and the best one is kept"
    ),
    r"eval_strategy|eval_batch_size|per_device_eval_batch_size|evaluation_strategy|do_\w+": (
        "the evaluate stage has its own parameters"
    ),
    r"dataloader_\w+|preprocessing_\w+|dataset_processes|dataset_num_proc|dataset_prepared_path|ddp_\w+|tokenized_path|"
    r"remove_unused_columns|cache_dir|group_by_length|data_shared_file_system": "only speed",
    r"tf32|torch_compile\w*|use_reentrant_gc|gradient_checkpointing_kwargs|low_cpu_mem_usage|device_map|strict|"
    r"use_fast_tokenizer|debug|local_rank|world_size|ddp": "only speed and memory",
    r"deepspeed|fsdp\w*|ray_\w+|dp_shard_size|dp_replicate_size": "train.processes and train.nodes share the work",
}
"""Keys that the tools share and that do not change the trained weights."""
