"""Multitask prompt tuning: one prompt times a rank-r matrix for each task, [P ∘ (u_t v_t); E(x)]. arXiv:2303.02861.

The call and `generate` take `task_ids`, the task t of each row. An encoder-decoder model has the second half of P
before the decoder's text. Shapes: P (n, d), u (tasks, n, r), v (tasks, r, d), B rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from peftcore.errors import CheckpointError, ConfigError
from peftcore.prompts.learner import EMBEDDINGS
from peftcore.prompts.virtual_tokens import VirtualTokens
from peftcore.prompts.vocabulary import VocabularyPromptConfig, start_of
from peftcore.registry import register

FROM_SOURCE = ("AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED")
"""Starts that read the prompt of a training on source tasks."""


@dataclass
class MultitaskPromptTuningConfig(VocabularyPromptConfig):
    """Multitask prompt tuning's options under PEFT's names."""

    starts: ClassVar[tuple[str, ...]] = ("RANDOM", "SAMPLE_VOCAB", "TEXT", *FROM_SOURCE)

    prompt_tuning_init_state_dict_path: str | None = None
    """The `adapter_model.safetensors` of the source tasks."""
    prompt_tuning_init_task: int = 0
    """Which source task "EXACT_SOURCE_TASK" takes."""
    num_ranks: int = 1
    """r."""
    num_tasks: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("num_ranks", "num_tasks")
        if self.prompt_tuning_init in FROM_SOURCE and not self.prompt_tuning_init_state_dict_path:
            raise ConfigError(
                f"MultitaskPromptTuningConfig: prompt_tuning_init={self.prompt_tuning_init!r} needs "
                "prompt_tuning_init_state_dict_path, the source tasks' adapter_model.safetensors"
            )


@register("MULTITASK_PROMPT_TUNING", MultitaskPromptTuningConfig)
class MultitaskPromptTuning(VirtualTokens):
    prompts_decoder = True

    def __init__(self, config: MultitaskPromptTuningConfig, model: nn.Module):
        super().__init__(config, model)
        tasks, rank, width = config.num_tasks, config.num_ranks, self.width
        self.embedding = nn.Parameter(torch.empty(self.total, width))
        self.prefix_task_cols = nn.Parameter(torch.empty(tasks, self.total, rank))
        self.prefix_task_rows = nn.Parameter(torch.empty(tasks, rank, width))

    @torch.no_grad()
    def reset_parameters(self, model: nn.Module) -> None:
        start = start_of(self.config, model, self.total)
        self.embedding.normal_() if start is None else self.embedding.copy_(start)
        self.prefix_task_cols.normal_(std=0.02)
        self.prefix_task_rows.normal_(std=0.02)
        if self.config.prompt_tuning_init in FROM_SOURCE:
            self._start_from_source(Path(self.config.prompt_tuning_init_state_dict_path))

    def _start_from_source(self, path: Path) -> None:
        if path.suffix != ".safetensors":
            raise ConfigError(f"{path} is no safetensors file; a pickle can run code when it is read: convert it first")
        try:
            source = load_file(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"the source prompt {path} cannot be read: {error}") from error
        start = self.config.prompt_tuning_init
        wanted = {EMBEDDINGS: self.embedding}
        if start != "ONLY_SOURCE_SHARED":
            wanted |= {"prefix_task_cols": self.prefix_task_cols, "prefix_task_rows": self.prefix_task_rows}
        for key, own in wanted.items():
            if key not in source:
                raise CheckpointError(f"the source prompt {path} has no {key}; give one of multitask prompt tuning")
            value = source[key]
            if key != EMBEDDINGS:
                value = _one_task(
                    value, None if start == "AVERAGE_SOURCE_TASKS" else self.config.prompt_tuning_init_task
                )
            if value.shape != own.shape:
                raise ConfigError(
                    f"the source prompt's {key} is {list(value.shape)}, here {list(own.shape)}; "
                    "take its num_virtual_tokens and num_ranks, and num_tasks=1"
                )
            own.copy_(value)

    @classmethod
    def forward_arguments(cls, config: Any) -> frozenset[str]:
        return frozenset({"task_ids"})

    def prompts(self, inputs: dict[str, Any], rows: int) -> Tensor:
        tasks = inputs.get("task_ids")
        if tasks is None:
            raise ConfigError("multitask prompt tuning needs task_ids, the number of each row's task")
        if rows % len(tasks):
            raise ConfigError(f"task_ids has {len(tasks)} entries for {rows} rows; give one for each row")
        tasks = tasks.to(self.embedding.device).repeat_interleave(rows // len(tasks))  # rows may be beams
        return self.embedding * (self.prefix_task_cols[tasks] @ self.prefix_task_rows[tasks])

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        own = {key: tensor.detach() for key, tensor in self.named_parameters()}
        return {EMBEDDINGS: own.pop("embedding"), **own}

    @torch.no_grad()
    def load_checkpoint_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        for key, own in self.checkpoint_tensors().items():
            own.copy_(tensors[key])


def _one_task(values: Tensor, task: int | None) -> Tensor:
    """(tasks, ...) -> (1, ...): the mean, or one task's."""
    if task is None:
        return values.mean(0, keepdim=True)
    if not 0 <= task < len(values):
        raise ConfigError(f"prompt_tuning_init_task={task}, but the source has tasks 0 to {len(values) - 1}")
    return values[task : task + 1]
