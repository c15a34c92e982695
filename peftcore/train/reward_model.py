"""A trained reward model that scores answers, for evaluation, best-of-n sampling and trainers that need a reward."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from peftcore.config import PeftConfig, TaskType
from peftcore.errors import ConfigError, TrainingError
from peftcore.model.peft_model import PeftModel
from peftcore.train.batches import ClassificationCollator
from peftcore.train.reward import sequence_rewards

Prompt = str | Sequence[Mapping[str, Any]]
"""Text as the model sees it, up to the answer; or a list of messages for the tokenizer's chat template."""
WEIGHTS = "adapter_model.safetensors"
_HEAD = re.compile(r"(?:^|\.)(?:score|classifier|classifier\.out_proj)\.weight$")


class RewardModel:
    """A callable `(prompt, answer, row=None) -> float`: the reward of an answer, higher for a better one.

    Rewards of answers to the same prompt can be compared. The answer is followed by the token that ends it, as in
    training. A decoder reads the reward at the last token that is not its padding token.

    Args:
        model: A sequence classifier with one output, such as a PeftModel that RewardTrainer has trained.
        tokenizer: The tokenizer of the model.
        end_token_id: Token that ends an answer. None: the tokenizer's EOS token.
        batch_size: Answers per forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        end_token_id: int | None = None,
        batch_size: int = 16,
    ) -> None:
        self.model, self.tokenizer, self.batch_size = model.eval(), tokenizer, batch_size
        self.end_token_id: Any = tokenizer.eos_token_id if end_token_id is None else end_token_id
        outputs = getattr(getattr(model, "config", None), "num_labels", 1)
        if outputs != 1:
            raise ConfigError(
                f"{type(model).__name__} has {outputs} outputs, so it is a classifier; a reward model has num_labels=1"
            )

    @classmethod
    def from_pretrained(
        cls,
        adapter: str | Path,
        base: str | Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        batch_size: int = 16,
        **options: Any,
    ) -> "RewardModel":
        """Load a reward model from an adapter's folder and the base that it was trained on.

        Args:
            adapter: Folder that `save_pretrained` has written after RewardTrainer.
            base: Folder or hub name of the base model.
            tokenizer: The tokenizer of the model. None: that of the base.
            batch_size: Answers per forward pass.
            options: Further arguments of `AutoModelForSequenceClassification.from_pretrained`, such as `dtype`.

        Raises:
            ConfigError: The adapter is not that of a reward model.
        """
        check_reward_adapter(Path(adapter))
        tokenizer = AutoTokenizer.from_pretrained(base) if tokenizer is None else tokenizer
        assert tokenizer is not None
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=pad, **options)
        return cls(PeftModel.from_pretrained(model, adapter), tokenizer, batch_size=batch_size)

    def __call__(self, prompt: Prompt, answer: str, row: Mapping[str, Any] | None = None) -> float:
        """Return the reward of one answer. row: ignored; rewards that are functions of the row take it."""
        return self.rewards([prompt], [answer])[0]

    @torch.no_grad()
    def rewards(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
        """Return the reward of each answer to the prompt at its place.

        Raises:
            TrainingError: A reward is not finite, or the model does not have one output for each sequence.
        """
        ids = [self._tokenize(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        values, device = [0.0] * len(ids), next(self.model.parameters()).device
        pad = getattr(getattr(self.model, "config", None), "pad_token_id", None)
        collate = ClassificationCollator(0 if pad is None else pad)
        for first in range(0, len(order), self.batch_size):
            batch = order[first : first + self.batch_size]
            columns = collate([{"input_ids": ids[i], "label": 0} for i in batch])
            rewards = sequence_rewards(
                self.model, columns["input_ids"].to(device), columns["attention_mask"].to(device)
            )
            if not rewards.isfinite().all():
                worst = batch[int((~rewards.isfinite()).nonzero()[0])]
                raise TrainingError(
                    f"the reward of the answer {answers[worst][:80]!r} is {rewards[batch.index(worst)].item()}: the "
                    "weights or activations of the reward model have overflowed; load it in float32, or train it again "
                    "with a lower learning rate"
                )
            for i, value in zip(batch, rewards.tolist(), strict=True):
                values[i] = value
        return values

    def _tokenize(self, prompt: Prompt, answer: str) -> list[int]:
        if not isinstance(prompt, str):
            messages = [dict(message) for message in prompt]
            prompt = str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        ids = self.tokenizer(prompt + answer, add_special_tokens=False)["input_ids"]
        assert isinstance(ids, list)
        return [*ids, self.end_token_id]


def check_reward_adapter(folder: Path) -> None:
    """Check, by its configuration and the shape of its head, that an adapter is that of a reward model.

    Raises:
        ConfigError: It has another task, no head, or a head of several classes.
    """
    task = PeftConfig.from_pretrained(folder).task_type
    if task != TaskType.SEQ_CLS:
        raise ConfigError(
            f"{folder} is an adapter for {TaskType(task).value if task else 'no task'}, and a reward model is one for "
            "SEQ_CLS with one output; train it with RewardTrainer (train.objective: reward)"
        )
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        heads = {name: file.get_slice(name).get_shape() for name in file.keys() if _HEAD.search(name)}  # noqa: SIM118
    if not heads:
        raise ConfigError(
            f"{folder} has no head (score or classifier), so it gives no rewards; train it with "
            "task_type=TaskType.SEQ_CLS, which saves the head with the adapter"
        )
    for name, (outputs, *_) in heads.items():
        if outputs != 1:
            raise ConfigError(
                f"{folder} is a classifier of {outputs} classes ({name}), and a reward model has one output; give an "
                "adapter that was trained with RewardTrainer (train.objective: reward)"
            )
