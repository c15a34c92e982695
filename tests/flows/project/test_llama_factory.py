"""LLaMA-Factory's keys become the parameters that train the same."""

import json
from pathlib import Path
from typing import Any

import pytest

from flows.project.llama_factory import TOOL
from flows.project.translation import translate

SFT = """
model_name_or_path: example/model-1B
model_revision: v2
stage: sft
do_train: true
finetuning_type: lora
quantization_bit: 4
double_quantization: false
lora_rank: 8
lora_target: all
dataset: chats
template: qwen3
cutoff_len: 1024
max_samples: 1000
output_dir: saves/a
logging_steps: 10
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 2.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
val_size: 0.1
"""


def translated(text: str, tmp_path: Path, entry: dict[str, Any] | None = None) -> Any:
    (tmp_path / "data").mkdir(exist_ok=True)
    (tmp_path / "data" / "chats.jsonl").write_text("{}\n")
    index = {"chats": {"file_name": "chats.jsonl"} if entry is None else entry}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(index))
    (tmp_path / "train.yaml").write_text(text)
    return translate(TOOL, tmp_path / "train.yaml")


def test_a_file_is_translated_whole(tmp_path: Path) -> None:
    done = translated(SFT, tmp_path)
    assert not done.missing
    assert done.project == {
        "base": "hub:example/model-1B@v2",
        "data": str(tmp_path / "data" / "chats.jsonl"),
        "task": "chat",
    }
    assert done.values == {
        "train.objective": "sft",
        "method.name": "lora",
        "method.init": "default",
        "method.r": 8,
        "method.lora_alpha": 16.0,  # LLaMA-Factory's default is twice the rank
        "method.lora_dropout": 0.0,
        "method.target_modules": "all-linear",
        "quantization.storage": "nf4",
        "quantization.double_quant": False,
        "quantization.compute_dtype": "bfloat16",
        "data.max_length": 1024,
        "data.overlong": "truncate",
        "data.train_rows": 1000,
        "data.validation_share": 0.1,
        "train.batch_size": 1,
        "train.gradient_accumulation": 8,
        "train.learning_rate": 1e-4,
        "train.epochs": 2.0,
        "train.schedule": "cosine",
        "train.warmup_share": 0.1,
        "train.weight_decay": 0.0,
        "train.optimizer": "adamw",
        "train.gradient_checkpointing": "blocks",
    }
    assert set(done.without_effect) == {"do_train", "output_dir", "logging_steps"} and set(done.notes) == {"template"}


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("finetuning_type: oft\noft_target: a,b", {"method.name": "oft", "method.options.oft_block_size": 32}),
        ("stage: dpo\npref_loss: ipo\npref_beta: 0.2", {"train.preference.loss": "ipo", "train.preference.beta": 0.2}),
        ("stage: dpo\npref_loss: orpo", {"train.objective": "orpo"}),
        ("stage: dpo\npref_loss: simpo\npref_beta: 2", {"train.preference.beta": 2.0, "train.preference.gamma": 0.5}),
        ("stage: kto\nkto_chosen_weight: 2", {"train.kto.beta": 0.1, "train.kto.desirable_weight": 2.0}),
        ("pissa_init: true\npissa_iter: 4", {"method.options.init_lora_weights": "pissa_niter_4"}),
        ("additional_target: embed_tokens,lm_head", {"method.options.modules_to_save": ["embed_tokens", "lm_head"]}),
        ("mask_history: true", {"data.supervise": "last"}),
        ("quantization_bit: 8", {"quantization.storage": "int8"}),
        ("neat_packing: true", {"train.batching": "packed", "train.pack_tokens": 16384}),
    ],
)  # fmt: skip
def test_single_keys(text: str, values: dict[str, Any], tmp_path: Path) -> None:
    done = translated(f"{text}\n", tmp_path)
    assert values.items() <= done.values.items() and not done.missing


@pytest.mark.parametrize(("stage", "task"), [("pt", "text"), ("rm", "reward"), ("kto", "unpaired_preference")])
def test_stages_are_tasks(stage: str, task: str, tmp_path: Path) -> None:
    done = translated(f"stage: {stage}\nadd_special_tokens: <|a|>, <|b|>\nresize_vocab: true\n", tmp_path)
    assert not done.missing and done.project["task"] == task
    assert done.values["data.special_tokens"] == ["<|a|>", "<|b|>"]


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("stage: ppo", "stage"),
        ("stage: dpo\npref_loss: kto_pair", "stage"),
        ("finetuning_type: full", "finetuning_type"),
        ("quantization_bit: 3", "finetuning_type"),
        ("quantization_method: hqq", "quantization_method"),
        ("dataset: chats,others", "dataset"),
        ("dataset: others", "dataset"),
        ("train_on_prompt: true", "train_on_prompt"),
        ("use_galore: true", "use_galore"),
        ("lr_scheduler_type: polynomial", "lr_scheduler_type"),
    ],
)
def test_keys_that_change_the_training_are_missing(text: str, key: str, tmp_path: Path) -> None:
    assert list(translated(f"{text}\n", tmp_path).missing) == [key]


def test_a_column_of_another_name_is_named(tmp_path: Path) -> None:
    entry = {"file_name": "chats.jsonl", "columns": {"prompt": "instruction", "response": "reply"}}
    missing = translated("dataset: chats\n", tmp_path, entry).missing
    assert "'reply'" in missing["dataset"] and "output" in missing["dataset"]


def test_a_data_set_of_the_hub_and_one_without_its_file(tmp_path: Path) -> None:
    assert translated("dataset: chats\n", tmp_path, {"hf_hub_url": "a/b"}).project["data"] == "hub:a/b"
    assert "--data FILE" in translated("dataset: chats\n", tmp_path, {"file_name": "gone.json"}).missing["dataset"]
