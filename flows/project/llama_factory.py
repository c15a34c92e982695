"""Translates configuration files of LLaMA-Factory (https://llamafactory.readthedocs.io), as its `train` takes them."""

import json
from collections.abc import Mapping
from typing import Any

from flows.project.translation import (
    BASE,
    DATA,
    FULL_FINE_TUNING,
    NO_EFFECT,
    PLAIN_LORA,
    SCHEDULES,
    TASK,
    TRAINING,
    Config,
    NoCounterpart,
    Rule,
    Tool,
    Values,
    as_number,
    base_of,
    data_of,
    never,
    number,
    only,
    optimizer,
    switched_on,
    validation,
)

INDEX = "dataset_info.json"
COLUMNS = {
    "prompt": ("instruction", "prompt", "question"),
    "query": ("input",),
    "response": ("output", "completion", "answer"),
    "messages": ("messages", "conversations"),
    "system": ("system",),
    "tools": ("tools",),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "kto_tag": ("label",),
}
"""{role of a column in dataset_info.json: names of columns that the pipeline reads}"""
LOSSES = ("sigmoid", "hinge", "ipo")


def _base(name: str, config: Config) -> Mapping[str, Any]:
    return base_of(name, config, config.values.get("model_revision"))


def _dataset(names: str, config: Config) -> Mapping[str, Any]:
    listed = [name.strip() for name in str(names).split(",")]
    if len(listed) != 1:
        raise NoCounterpart("a project reads one source; put the files into one folder and give --data FOLDER")
    (name,) = listed
    folder = config.place(str(config.values.get("dataset_dir") or "data"))
    try:
        entry = json.loads((folder / INDEX).read_text(encoding="utf-8"))[name]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NoCounterpart(f"{folder / INDEX} has no entry {name}; give the file with --data FILE") from error
    for role, column in entry.get("columns", {}).items():
        if column not in COLUMNS.get(role, ()):
            raise NoCounterpart(f"its column {column!r} is not read; rename it to {' or '.join(COLUMNS.get(role, ()))}")
    if entry.get("hf_hub_url"):
        return {DATA: f"hub:{entry['hf_hub_url']}"}
    if not entry.get("file_name"):
        raise NoCounterpart(f"{INDEX} names no file and no hub data set for it; give the file with --data FILE")
    source = data_of(str(folder / entry["file_name"]), config)
    if source[DATA].startswith("hub:"):
        raise NoCounterpart(f"there is no {folder / entry['file_name']}; give the file with --data FILE")
    return source


def _stage(stage: str, config: Config) -> Mapping[str, Any]:
    if stage == "sft":
        return {TASK: "chat", "train.objective": "sft"}
    if stage == "kto":
        weights = {
            "train.kto.desirable_weight": number(config.values.get("kto_chosen_weight", 1.0)),
            "train.kto.undesirable_weight": number(config.values.get("kto_rejected_weight", 1.0)),
        }
        beta = {"train.kto.beta": number(config.values.get("pref_beta", 0.1))}
        return {TASK: "unpaired_preference", "train.objective": "kto", **beta, **weights}
    if stage in ("pt", "rm"):
        return {TASK: {"pt": "text", "rm": "reward"}[stage]}
    if stage != "dpo":
        raise NoCounterpart(f"the stage {stage}; pt, sft, rm, dpo and kto have one")
    loss, beta = config.values.get("pref_loss", "sigmoid"), number(config.values.get("pref_beta", 0.1))
    if loss == "orpo":
        return {TASK: "preference", "train.objective": "orpo", "train.preference.beta": beta}
    if loss == "simpo":
        margin = {"train.preference.gamma": number(config.values.get("simpo_gamma", 0.5))}
        return {TASK: "preference", "train.objective": "simpo", "train.preference.beta": beta, **margin}
    if loss not in LOSSES:
        raise NoCounterpart(f"pref_loss {loss}; {', '.join(LOSSES)}, orpo and simpo have one")
    options = {"train.preference.loss": loss, "train.preference.beta": beta}
    return {TASK: "preference", "train.objective": "dpo", **options}


def _finetuning_type(kind: str, config: Config) -> Mapping[str, Any]:
    bits = config.values.get("quantization_bit")
    if kind in ("full", "freeze"):
        raise NoCounterpart(FULL_FINE_TUNING.format(tool="LLaMA-Factory"))
    if bits not in (None, 4, 8):
        raise NoCounterpart(f"quantization_bit {bits}; 4 and 8 have one")
    four = config.values.get("quantization_type", "nf4")
    storage = {"quantization.storage": {None: "none", 4: four, 8: "int8"}[bits]}
    given = config.values
    if kind == "lora":
        rank = given.get("lora_rank", 8)
        lora = {"method.r": rank, "method.lora_alpha": number(given.get("lora_alpha") or 2 * rank)}
        dropout = {"method.lora_dropout": number(given.get("lora_dropout", 0.0))}
        modules = _modules(given.get("lora_target", "all"), config)
        return {**PLAIN_LORA, **lora, **dropout, **modules, **storage}
    if kind == "oft":
        size = {"method.options.oft_block_size": given.get("oft_block_size", 32)}
        return {"method.name": "oft", **size, **_modules(given.get("oft_target", "all"), config), **storage}
    raise NoCounterpart(f"{kind}; lora and oft have one")


def _modules(names: str, _: Config) -> Mapping[str, Any]:
    listed = [name.strip() for name in str(names).split(",")]
    return {"method.target_modules": "all-linear" if listed == ["all"] else listed}


def _pissa(on: bool, config: Config) -> Mapping[str, Any]:
    rounds = config.values.get("pissa_iter", 16)
    start = "pissa" if rounds == -1 else f"pissa_niter_{rounds}"
    return {"method.options.init_lora_weights": start} if on else {}


def _packing(on: bool, config: Config) -> Mapping[str, Any]:
    if not on:
        return {}
    tokens = config.values["cutoff_len"] * config.values["per_device_train_batch_size"]
    return Values(
        {"train.batching": "packed", "train.pack_tokens": tokens},
        "rows of a pack do not see each other, as with neat_packing" if not config.values.get("neat_packing") else "",
    )


def _template(name: str, _: Config) -> Mapping[str, Any]:
    return Values({}, f"the base's own chat template is used, and not LLaMA-Factory's {name!r}; compare a prepared row")


RULES: Mapping[str, Rule] = {
    **TRAINING,
    "model_name_or_path": _base,
    "model_revision": lambda value, _: {},  # read with model_name_or_path
    "stage": _stage,
    "pref_loss": lambda value, _: {},  # read with stage
    "pref_beta": lambda value, _: {},
    "kto_chosen_weight": lambda value, _: {},  # read with stage
    "kto_rejected_weight": lambda value, _: {},
    "simpo_gamma": lambda value, _: {},
    "pref_ftx": as_number("train.preference.rpo_alpha"),
    "dpo_label_smoothing": as_number("train.preference.label_smoothing"),
    "finetuning_type": _finetuning_type,
    **dict.fromkeys(
        ("lora_rank", "lora_alpha", "lora_dropout", "lora_target", "oft_block_size", "oft_target", "quantization_bit"),
        lambda value, _: {},  # read with finetuning_type
    ),
    "additional_target": lambda value, _: {"method.options.modules_to_save": [n.strip() for n in value.split(",")]},
    "use_rslora": switched_on("method.use_rslora", True),
    "use_dora": switched_on("method.options.use_dora", True),
    "pissa_init": _pissa,
    "pissa_iter": lambda value, _: {},  # read with pissa_init
    "pissa_convert": never("convert the trained adapter by peftcore's save_pretrained with path_initial_model"),
    "adapter_name_or_path": never("training starts with a new adapter; peftcore adapters go on by train.start_from"),
    "quantization_type": lambda value, _: {},  # read with finetuning_type
    "quantization_method": only("bnb", "bases are quantised by bitsandbytes"),
    "double_quantization": "quantization.double_quant",
    "dataset": _dataset,
    "dataset_dir": lambda value, _: {},  # read with dataset
    "eval_dataset": never("validation and test rows are split from the data"),
    "template": _template,
    "cutoff_len": lambda value, _: {"data.max_length": value, "data.overlong": "truncate"},
    "max_samples": "data.train_rows",
    "val_size": validation,
    "train_on_prompt": never("prompts get no loss; data.supervise chooses among the answers"),
    "mask_history": switched_on("data.supervise", "last"),
    "default_system": "data.system_prompt",
    "packing": _packing,
    "neat_packing": _packing,
    "per_device_train_batch_size": "train.batch_size",
    "num_train_epochs": as_number("train.epochs"),
    "optim": optimizer,
    "lr_scheduler_type": ("train.schedule", SCHEDULES),
    "disable_gradient_checkpointing": lambda value, _: {
        "train.gradient_checkpointing": "none" if value else "blocks"
    },
    "pure_bf16": never("adapters train in float32 and their products in quantization.compute_dtype"),
    "label_smoothing_factor": never("labels are not smoothed"),
    "rope_scaling": never("positions are the base's own"),
    "mix_strategy": only("concat", "a project reads one source"),
    "add_special_tokens": lambda value, _: {"data.special_tokens": [token.strip() for token in value.split(",")]},
    "resize_vocab": lambda value, _: {},  # data.special_tokens resizes the embeddings
    **{f"use_{name}": never(f"{name} is not built") for name in ("galore", "apollo", "badam", "adam_mini", "muon")},
}  # fmt: skip

TOOL = Tool(
    name="LLaMA-Factory",
    defaults={
        "stage": "sft",
        "finetuning_type": "lora",
        "cutoff_len": 2048,
        "learning_rate": 5e-5,
        "num_train_epochs": 3.0,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "lr_scheduler_type": "linear",
        "weight_decay": 0.0,
        "warmup_ratio": 0.0,
        "optim": "adamw_torch",
        "disable_gradient_checkpointing": False,
    },
    rules=RULES,
    sources={BASE: ("model_name_or_path", "model_revision"), DATA: ("dataset", "dataset_dir")},
    no_effect={
        **NO_EFFECT,
        r"flash_attn|use_unsloth\w*|enable_liger_kernel|upcast_\w+|offload_\w+|infer_\w+|vllm_\w+|sglang_\w+|export_\w+|"
        r"use_kt|kt_\w+|use_v1_kernels": "only speed, memory or inference",
        r"print_param_status|hf_hub_token|ms_hub_token|om_hub_token|media_dir": "only how files are found or shown",
        r"tool_format|enable_thinking|preserve_thinking": "the base's own chat template decides",
    },
)
"""LLaMA-Factory's keys."""
