"""Multitask prompt tuning: a prompt times a rank-r matrix for each task, [P ∘ (u_t v_t); E(x)]. arXiv:2303.02861.

The model call and `generate` accept `task_ids`, the task t of each row. In an encoder-decoder model, the second half of
P stands before the decoder's text. Shapes: P (n, d), u (tasks, n, r), v (tasks, r, d), B rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from peftcore.errors import CheckpointError, ConfigError, pickle_advice
from peftcore.kernels.start_values import normal_
from peftcore.prompts.learner import EMBEDDINGS, embedding_of
from peftcore.prompts.virtual_tokens import VirtualTokens
from peftcore.prompts.vocabulary import VocabularyPromptConfig, initial_embeddings
from peftcore.registry import register

FROM_SOURCE = ("AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED")
"""Initialisations that read a prompt trained on source tasks."""


@dataclass
class MultitaskPromptTuningConfig(VocabularyPromptConfig):
    """Options of multitask prompt tuning, with HF PEFT's names."""

    derives_from: ClassVar[str] = "PROMPT_TUNING"
    initialisations: ClassVar[tuple[str, ...]] = ("RANDOM", "SAMPLE_VOCAB", "TEXT", *FROM_SOURCE)

    prompt_tuning_init_state_dict_path: str | None = None
    """Path of the source tasks' `adapter_model.safetensors`."""
    prompt_tuning_init_task: int = 0
    """Index of the source task for "EXACT_SOURCE_TASK"."""
    num_ranks: int = 1
    """r."""
    num_tasks: int = 1
    """Tasks (count), each with its own u_t and v_t."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("num_ranks", "num_tasks")
        if self.prompt_tuning_init in FROM_SOURCE and not self.prompt_tuning_init_state_dict_path:
            raise ConfigError(
                f"MultitaskPromptTuningConfig: prompt_tuning_init={self.prompt_tuning_init!r} needs "
                "prompt_tuning_init_state_dict_path, the source tasks' adapter_model.safetensors"
            )

    def without_effect(self) -> dict[str, str]:
        unused = super().without_effect()
        if self.prompt_tuning_init_state_dict_path and self.prompt_tuning_init not in FROM_SOURCE:
            unused["prompt_tuning_init_state_dict_path"] = "a prompt_tuning_init from source tasks"
        if self.prompt_tuning_init_task and self.prompt_tuning_init != "EXACT_SOURCE_TASK":
            unused["prompt_tuning_init_task"] = "prompt_tuning_init='EXACT_SOURCE_TASK'"
        return unused


@register("MULTITASK_PROMPT_TUNING", MultitaskPromptTuningConfig)
class MultitaskPromptTuning(VirtualTokens):
    """A shared prompt and a low-rank factor for each task."""

    prompts_decoder = True

    def __init__(self, config: MultitaskPromptTuningConfig, model: nn.Module):
        super().__init__(config, model)
        tasks, rank, width = config.num_tasks, config.num_ranks, self.width
        self.embedding = embedding_of(torch.empty(self.total, width))
        self.prefix_task_cols = nn.Parameter(torch.empty(tasks, self.total, rank))
        self.prefix_task_rows = nn.Parameter(torch.empty(tasks, rank, width))

    @torch.no_grad()
    def reset_parameters(self, model: nn.Module) -> None:
        normal_(self.vectors)
        initial = initial_embeddings(self.config, model, self.total)
        if initial is not None:
            self.vectors.copy_(initial)
        normal_(self.prefix_task_cols, std=0.02)
        normal_(self.prefix_task_rows, std=0.02)
        if self.config.prompt_tuning_init in FROM_SOURCE:
            self._start_from_source(Path(self.config.prompt_tuning_init_state_dict_path))

    def _start_from_source(self, path: Path) -> None:
        if path.suffix != ".safetensors":
            raise ConfigError(f"{path} is not a safetensors file; {pickle_advice(path.parent)}")
        try:
            source = load_file(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"the source prompt {path} cannot be read: {error}") from error
        initialisation = self.config.prompt_tuning_init
        parameters = {EMBEDDINGS: self.vectors}
        if initialisation != "ONLY_SOURCE_SHARED":
            parameters |= {"prefix_task_cols": self.prefix_task_cols, "prefix_task_rows": self.prefix_task_rows}
        for key, parameter in parameters.items():
            if key not in source:
                raise CheckpointError(
                    f"the source prompt {path} has no {key}; give a prompt of multitask prompt tuning"
                )
            value = source[key]
            if key != EMBEDDINGS:
                average = initialisation == "AVERAGE_SOURCE_TASKS"
                value = _one_task(value, None if average else self.config.prompt_tuning_init_task)
            if value.shape != parameter.shape:
                raise ConfigError(
                    f"the source prompt's {key} has shape {list(value.shape)}, this prompt needs "
                    f"{list(parameter.shape)}; use the source's num_virtual_tokens and num_ranks, and num_tasks=1"
                )
            parameter.copy_(value)

    @classmethod
    def forward_arguments(cls, config: Any) -> frozenset[str]:
        return frozenset({"task_ids"})

    def prompts(self, inputs: dict[str, Any], rows: int) -> Tensor:
        tasks = inputs.get("task_ids")
        if tasks is None:
            raise ConfigError("multitask prompt tuning needs task_ids, the task index of each row")
        if rows % len(tasks):
            raise ConfigError(f"task_ids has {len(tasks)} entries for {rows} rows; give one for each row")
        tasks = tasks.to(self.vectors.device).repeat_interleave(
            rows // len(tasks)
        )  # with beam search a row has several beams
        return self.vectors * (self.prefix_task_cols[tasks] @ self.prefix_task_rows[tasks])

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        tensors = {key: tensor.detach() for key, tensor in self.named_parameters()}
        return {EMBEDDINGS: tensors.pop("embedding.weight"), **tensors}

    @torch.no_grad()
    def load_checkpoint_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        for key, parameter in self.checkpoint_tensors().items():
            parameter.copy_(tensors[key])


def _one_task(values: Tensor, task: int | None) -> Tensor:
    """Return the mean of (tasks, ...), or one task's value, as (1, ...)."""
    if task is None:
        return values.mean(0, keepdim=True)
    if not 0 <= task < len(values):
        raise ConfigError(
            f"prompt_tuning_init_task={task}, but the source has the tasks 0 to {len(values) - 1}; give one of them"
        )
    return values[task : task + 1]
