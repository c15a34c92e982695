"""Axolotl's keys become the parameters that train the same."""

from pathlib import Path
from typing import Any

import pytest

from flows.project.axolotl import TOOL
from flows.project.translation import translate

QLORA = """
base_model: example/model-1B
load_in_4bit: true
adapter: qlora
datasets:
  - path: chats.jsonl
    type: chat_template
val_set_size: 0.05
sequence_len: 1024
sample_packing: true
eval_sample_packing: false
lora_r: 32
lora_alpha: 64
lora_dropout: 0.05
lora_target_linear: true
peft_use_rslora: true
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 3
optimizer: paged_adamw_32bit
lr_scheduler: constant_with_warmup
learning_rate: 2e-4
warmup_ratio: 0.1
weight_decay: 0.01
evals_per_epoch: 2
gradient_checkpointing: true
bf16: auto
attn_implementation: flash_attention_2
logging_steps: 1
wandb_project: chats
special_tokens:
  pad_token: "<|end|>"
"""


def translated(text: str, tmp_path: Path, data: bool = True) -> Any:
    (tmp_path / "axolotl.yaml").write_text(text)
    if data:
        (tmp_path / "chats.jsonl").write_text("{}\n")
    return translate(TOOL, tmp_path / "axolotl.yaml")


def test_a_qlora_file_is_translated_whole(tmp_path: Path) -> None:
    done = translated(QLORA, tmp_path)
    assert not done.missing
    assert done.project == {"base": "hub:example/model-1B", "data": str(tmp_path / "chats.jsonl")}
    assert done.values == {
        "method.name": "lora",
        "method.init": "default",
        "quantization.storage": "nf4",
        "quantization.compute_dtype": "auto",
        "method.r": 32,
        "method.lora_alpha": 64.0,
        "method.lora_dropout": 0.05,
        "method.target_modules": "all-linear",
        "method.use_rslora": True,
        "data.validation_share": 0.05,
        "data.max_length": 1024,
        "train.batching": "packed",
        "train.pack_tokens": 2048,
        "train.gradient_accumulation": 4,
        "train.batch_size": 2,
        "train.epochs": 3.0,
        "train.evaluations": 6,
        "train.optimizer": "paged_adamw",
        "train.schedule": "constant",
        "train.learning_rate": 2e-4,
        "train.warmup_share": 0.1,
        "train.weight_decay": 0.01,
        "train.gradient_checkpointing": "blocks",
        "tracking.project": "chats",
    }
    assert set(done.without_effect) == {"attn_implementation", "logging_steps"}
    assert set(done.notes) == {"sample_packing"}


def test_what_a_file_leaves_out_has_axolotls_default(tmp_path: Path) -> None:
    done = translated("base_model: a/b\nadapter: lora\nlora_r: 8\n", tmp_path).values
    assert done["train.epochs"] == 1.0 and done["train.batch_size"] == done["train.gradient_accumulation"] == 1
    assert done["train.warmup_share"] == 0.03 and done["train.optimizer"] == "adamw"
    assert done["method.target_modules"] is None and done["quantization.storage"] == "none"


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("load_in_8bit: true", {"quantization.storage": "int8"}),
        ("lora_target_modules: [q_proj]", {"method.target_modules": ["q_proj"]}),
        ("lora_target_modules: 'model.*q_proj'", {"method.target_modules": "model.*q_proj"}),
        ("optimizer: adamw_torch_8bit", {"train.optimizer": "adamw_8bit"}),
        ("tokens: [<|a|>]", {"data.special_tokens": ["<|a|>"]}),
        ("special_tokens: {pad_token: x, additional_special_tokens: [<|a|>]}", {"data.special_tokens": ["<|a|>"]}),
        ("warmup_steps: 10", {"train.warmup_steps": 10}),
        ("rl: ipo\nrl_beta: 0.2", {"train.objective": "dpo", "train.preference.loss": "ipo"}),
        ("rl: orpo\norpo_alpha: 0.2", {"train.objective": "orpo", "train.preference.beta": 0.2}),
        ("rl: simpo\nrl_beta: 2\nsimpo_gamma: 1", {"train.objective": "simpo", "train.preference.gamma": 1.0}),
        ("rl: kto\nrl_beta: 0.2\nkto_desirable_weight: 2", {"train.kto.beta": 0.2, "train.kto.desirable_weight": 2.0}),
        ("gradient_checkpointing: offload", {"train.gradient_checkpointing": "offload"}),
        ("val_set_size: 100", {"data.validation_rows": 100}),
        ("peft_use_dora: true", {"method.options.use_dora": True}),
    ],
)
def test_single_keys(text: str, values: dict[str, Any], tmp_path: Path) -> None:
    done = translated(f"adapter: lora\n{text}\n", tmp_path)
    assert values.items() <= done.values.items() and not done.missing


@pytest.mark.parametrize(
    ("text", "task"),
    [
        ("datasets: [{path: a/b, type: completion}]", "text"),
        ("reward_model: true", "reward"),
        ("datasets: [{path: a/b, type: chat_template, field_messages: conversations, "
         "message_property_mappings: {role: from, content: value}}]", None),
    ],
)  # fmt: skip
def test_tasks_and_columns_that_are_read_as_they_are(text: str, task: str | None, tmp_path: Path) -> None:
    done = translated(f"adapter: lora\n{text}\n", tmp_path)
    assert not done.missing and done.project.get("task") == task


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("neftune_noise_alpha: 5", "neftune_noise_alpha"),
        ("train_on_inputs: true", "train_on_inputs"),
        ("rl: gdpo", "rl"),
        ("adam_beta2: 0.95", "adam_beta2"),
        ("special_tokens: {eos_token: x}", "special_tokens"),
        ("datasets: [{path: a/b, type: chat_template}, {path: c/d}]", "datasets"),
        ("datasets: [{path: a/b, type: pointwise}]", "datasets"),
        ("datasets: [{path: a/b, type: completion, field: body}]", "datasets"),
        ("datasets: [{path: a/b, field_messages: turns}]", "datasets"),
        ("optimizer: adamw_torch_4bit", "optimizer"),
        ("adapter:", "adapter"),
    ],
)
def test_keys_that_change_the_training_are_missing(text: str, key: str, tmp_path: Path) -> None:
    head = "" if text.startswith("adapter") else "adapter: lora\n"
    missing = translated(f"{head}{text}\n", tmp_path).missing
    if key == "adapter":  # a file without an adapter is full fine-tuning
        missing |= translated("base_model: a/b\n", tmp_path).missing
    assert list(missing) == [key]


def test_a_prompt_template_of_axolotl_is_noted(tmp_path: Path) -> None:
    done = translated("adapter: lora\ndatasets: [{path: chats.jsonl, type: alpaca}]\n", tmp_path)
    assert "chat template" in done.notes["datasets"] and not done.missing
