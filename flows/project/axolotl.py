"""Translates configuration files of Axolotl (https://docs.axolotl.ai/docs/config-reference.html)."""

from collections.abc import Mapping
from typing import Any

from flows.project.translation import (
    BASE,
    DATA,
    FULL_FINE_TUNING,
    NO_EFFECT,
    PLAIN_LORA,
    SAME_ENDS,
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
    noted,
    number,
    only,
    optimizer,
    switched_on,
    validation,
)

TEMPLATES = "the base's own chat template is used"
OF_CHATS = ("chat_template", "sharegpt", "alpaca", "alpaca_chat", "chatml", "input_output")
"""Types of a data set whose rows are chats, questions and answers."""
READ_ELSEWHERE = ("path", "data_files", "type", "ds_type", "split", "revision", "trust_remote_code")
"""Keys of a data set that need no parameter of their own."""
READ_COLUMNS: Mapping[str, tuple[Any, ...]] = {
    "field_messages": ("messages", "conversations"),
    "message_property_mappings": ({"role": "role", "content": "content"}, {"role": "from", "content": "value"}),
    "message_field_role": ("role", "from"),
    "message_field_content": ("content", "value"),
    "roles": ({"user": ["human", "user"], "assistant": ["gpt", "assistant"]},),
    "roles_to_train": (["assistant"], ["gpt"], ["assistant", "gpt"]),
    "train_on_eos": ("turn",),
    "chat_template": ("tokenizer_default",),
    "field": ("text",),
}
"""{key of a data set: values that name what the pipeline reads without being told}"""


def _base(name: str, config: Config) -> Mapping[str, Any]:
    return base_of(name, config, config.values.get("revision_of_model"))


def _datasets(sets: Any, config: Config) -> Mapping[str, Any]:
    if not isinstance(sets, list) or len(sets) != 1:
        raise NoCounterpart("a project reads one source; put the files into one folder and give --data FOLDER")
    (one,) = sets
    for key, value in one.items():
        if key not in READ_ELSEWHERE and value not in READ_COLUMNS.get(key, ()):
            raise NoCounterpart(
                f"{key}: {value!r}; rename the columns; docs/how-to/from-axolotl.md says which are read"
            )
    if one.get("split", "train") != "train":
        raise NoCounterpart(f"split {one['split']!r} of a data set; give its file with --data")
    kind = str(one.get("type", "chat_template")).partition(".")[0]
    files = one.get("data_files")
    if isinstance(files, list):
        if len(files) != 1:
            raise NoCounterpart("data_files names several files; put them into one folder and give --data FOLDER")
        (files,) = files
    source = data_of(str(files or one["path"]), config)
    if config.values.get("rl"):  # preferences; columns of other names are errors of `prepare`
        return source
    if kind == "completion":
        return {**source, TASK: "text"}
    if kind not in OF_CHATS:
        raise NoCounterpart(f"rows of the type {kind!r}; these fit: {', '.join(OF_CHATS)} and completion")
    note = f"Axolotl's {kind} template wraps the texts in words of its own; here {TEMPLATES}"
    return Values(source, note if kind in ("alpaca", "chatml") else "")


def _adapter(name: str, config: Config) -> Mapping[str, Any]:
    if not name:
        raise NoCounterpart(FULL_FINE_TUNING.format(tool="Axolotl"))
    if name not in ("lora", "qlora"):
        raise NoCounterpart("of Axolotl's adapters lora and qlora have a counterpart; params.yaml has method.name")
    bits = {"load_in_4bit": "nf4", "load_in_8bit": "int8"}
    storage = next((kind for key, kind in bits.items() if config.values.get(key)), "none")
    return {**PLAIN_LORA, "quantization.storage": "nf4" if name == "qlora" else storage}


def _modules(names: Any, _: Config) -> Mapping[str, Any]:
    if isinstance(names, list):
        return {"method.target_modules": names}
    if names in ("all-linear", "all_linear"):
        return {"method.target_modules": "all-linear"}
    return {"method.target_modules": names}  # a pattern, as in HF PEFT


def _target_linear(on: bool, config: Config) -> Mapping[str, Any]:
    if on:
        return {"method.target_modules": "all-linear"}
    return {} if config.values.get("lora_target_modules") else {"method.target_modules": None}


def _packing(on: bool, config: Config) -> Mapping[str, Any]:
    if not on:
        return {}
    tokens = config.values["sequence_len"] * config.values["micro_batch_size"]
    return Values(
        {"train.batching": "packed", "train.pack_tokens": tokens},
        "rows of a pack do not see each other here, so a loss is that of the rows alone",
    )


def _overlong(strategy: str, _: Config) -> Mapping[str, Any]:
    return {"data.overlong": {"drop": "drop", "truncate": "truncate", "raise": "error"}[strategy]}


def _preferences(kind: str, config: Config) -> Mapping[str, Any]:
    beta = {"train.preference.beta": number(config.values["rl_beta"])} if config.values.get("rl_beta") else {}
    if kind in ("dpo", "ipo"):
        loss = {"train.preference.loss": "ipo" if kind == "ipo" else "sigmoid"}
        return {TASK: "preference", "train.objective": "dpo", **loss, **beta}
    if kind == "orpo":
        return {TASK: "preference", "train.objective": "orpo", **beta}
    if kind == "simpo":
        margin = {"train.preference.gamma": number(config.values.get("simpo_gamma") or 0.5)}
        return {TASK: "preference", "train.objective": "simpo", **margin, **beta}
    if kind == "kto":
        beta = {"train.kto.beta": number(config.values["rl_beta"])} if config.values.get("rl_beta") else {}
        return {TASK: "unpaired_preference", "train.objective": "kto", **beta}
    raise NoCounterpart(f"{kind}; dpo, ipo, orpo, simpo and kto have one")


def _special_tokens(tokens: Mapping[str, Any], _: Config) -> Mapping[str, Any]:
    if changed := sorted(set(tokens) - {"pad_token", "additional_special_tokens"}):
        raise NoCounterpart(f"{', '.join(changed)}: {SAME_ENDS}")
    added = list(tokens.get("additional_special_tokens") or [])
    return {"data.special_tokens": added} if added else {}


def _evaluations(per_epoch: Any, config: Config) -> Mapping[str, Any]:
    return {"train.evaluations": max(1, round(number(per_epoch) * number(config.values["num_epochs"])))}


def _checkpointing(kind: Any, config: Config) -> Mapping[str, Any]:
    offloads = str(kind).startswith("offload") or config.values.get("activation_offloading")
    return {"train.gradient_checkpointing": "offload" if offloads else "blocks" if kind else "none"}


def _chat_template(name: str, _: Config) -> Mapping[str, Any]:
    return Values({}, "" if name == "tokenizer_default" else f"{TEMPLATES}, and not {name!r}; compare a prepared row")


RULES: Mapping[str, Rule] = {
    **TRAINING,
    "base_model": _base,
    "revision_of_model": lambda value, _: {},  # read with base_model
    "datasets": _datasets,
    "test_datasets": never("the test rows are split from the data; give their share as data.test_share"),
    "adapter": _adapter,
    "load_in_4bit": lambda value, _: {},  # read with adapter
    "load_in_8bit": lambda value, _: {},
    "lora_r": "method.r",
    "lora_alpha": as_number("method.lora_alpha"),
    "lora_dropout": as_number("method.lora_dropout"),
    "lora_target_modules": _modules,
    "lora_target_linear": _target_linear,
    "lora_target_parameters": "method.options.target_parameters",
    "lora_modules_to_save": "method.options.modules_to_save",
    "lora_rank_pattern": "method.options.rank_pattern",
    "lora_alpha_pattern": "method.options.alpha_pattern",
    "peft_use_dora": switched_on("method.options.use_dora", True),
    "peft_use_rslora": switched_on("method.use_rslora", True),
    "peft_init_lora_weights": "method.options.init_lora_weights",
    "peft_layers_to_transform": "method.options.layers_to_transform",
    "peft_layers_pattern": "method.options.layers_pattern",
    "peft_trainable_token_indices": "method.options.trainable_token_indices",
    "lora_model_dir": never("training starts with a new adapter; peftcore adapters go on by train.start_from"),
    "relora": never("restarts of LoRA are not built"),
    "sequence_len": "data.max_length",
    "excess_length_strategy": _overlong,
    "sample_packing": _packing,
    "micro_batch_size": "train.batch_size",
    "batch_size": never("give micro_batch_size and gradient_accumulation_steps instead"),
    "num_epochs": as_number("train.epochs"),
    "optimizer": optimizer,
    "lr_scheduler": ("train.schedule", SCHEDULES),
    "cosine_min_lr_ratio": never("the cosine falls to zero"),
    "cosine_constant_lr_ratio": never("the cosine falls over the whole run"),
    "val_set_size": validation,
    "gradient_checkpointing": _checkpointing,
    "activation_offloading": lambda value, _: {},  # read with gradient_checkpointing
    "train_on_inputs": never("prompts get no loss; data.supervise chooses among the answers"),
    "roles_to_train": only(["assistant"], "only assistant turns get a loss"),
    "train_on_eos": only("turn", "the end of each trained turn gets a loss"),
    "chat_template": _chat_template,
    "special_tokens": _special_tokens,
    "tokens": "data.special_tokens",
    "eot_tokens": noted("the end of a turn is what the base's chat template ends it with"),
    "rl": _preferences,
    "rl_beta": lambda value, _: {},  # read with rl
    "simpo_gamma": lambda value, _: {},  # read with rl
    "kto_desirable_weight": as_number("train.kto.desirable_weight"),
    "kto_undesirable_weight": as_number("train.kto.undesirable_weight"),
    "cpo_alpha": as_number("train.preference.rpo_alpha"),
    "orpo_alpha": as_number("train.preference.beta"),
    "dpo_label_smoothing": as_number("train.preference.label_smoothing"),
    "precompute_ref_log_probs": "train.preference.precompute_reference",
    "reward_model": lambda on, _: {TASK: "reward"} if on else {},
    "early_stopping_patience": "train.patience",
    "evals_per_epoch": _evaluations,
    "eval_steps": noted("train.evaluations is the number of evaluations of the whole run; its default stays"),
    "wandb_project": "tracking.project",
    "unfrozen_parameters": never(FULL_FINE_TUNING.format(tool="Axolotl")),
}

TOOL = Tool(
    name="Axolotl",
    defaults={
        "adapter": "",
        "num_epochs": 1.0,
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "sequence_len": 512,
        "lora_dropout": 0.0,
        "lora_target_linear": False,
        "lr_scheduler": "cosine",
        "optimizer": "adamw_torch_fused",
        "weight_decay": 0.0,
        "warmup_ratio": 0.03,
    },
    rules=RULES,
    sources={BASE: ("base_model", "revision_of_model"), DATA: ("datasets",)},
    no_effect={
        **NO_EFFECT,
        r"\w*attention|attn_\w+|flash_\w+|sdp_attention|flex_attn_\w+|liger_\w+|lora_\w+_kernel|plugins|use_kernels|"
        r"experts_implementation|qlora_sharded_model_loading|lora_on_cpu|pad_to_sequence_len|eval_sample_packing|"
        r"fused_attn_kernel|gptq_model_v1|use_scattermoe|use_sonicmoe|cut_cross_entropy|chunked_\w+|tiled_mlp\w*|"
        r"context_parallel_size|tensor_parallel_size|expert_parallel_size|experimental_skip_move_to_device": (
            "only speed and memory"
        ),
        r"model_type|tokenizer_type|processor_type|is_\w+_derived_model|tokenizer_use_\w+|tokenizer_legacy": (
            "transformers finds the classes from the base's own files"
        ),
        r"lora_fan_in_fan_out": "found from the layer's class",
        r"skip_prepare_dataset|shuffle_merged_datasets|sample_packing_\w+|dataset_exact_deduplication": (
            "the prepare stage decides"
        ),
        r"loss_watchdog_\w+": "train.on_bad_loss watches the loss",
        r"torchdistx_path|gptq_groupsize": "read by no version of today",
    },
)
"""Axolotl's keys."""
