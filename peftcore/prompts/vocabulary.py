"""Initial values of virtual tokens: random numbers, sampled tokens of the vocabulary, or the tokens of a text."""

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftcore.config import PromptLearningConfig
from peftcore.errors import ConfigError


@dataclass
class VocabularyPromptConfig(PromptLearningConfig):
    """Options of prompts that can be initialised from the vocabulary."""

    initialisations: ClassVar[tuple[str, ...]] = ("RANDOM", "SAMPLE_VOCAB", "TEXT")

    prompt_tuning_init: str = "RANDOM"
    """"RANDOM": normal numbers; "SAMPLE_VOCAB": tokens drawn from the vocabulary; "TEXT": prompt_tuning_init_text."""
    prompt_tuning_init_text: str | None = None
    """Repeated or cut to the number of virtual tokens."""
    tokenizer_name_or_path: str | None = None
    """Tokenizer of the text, for "TEXT"."""
    tokenizer_kwargs: dict[str, Any] | None = None
    """Additional arguments of the tokenizer; `trust_remote_code` is ignored, so no code of its repository runs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.prompt_tuning_init = str(getattr(self.prompt_tuning_init, "value", self.prompt_tuning_init))
        self.one_of("prompt_tuning_init", self.prompt_tuning_init, self.initialisations)
        name, from_text = type(self).__name__, self.prompt_tuning_init == "TEXT"
        for needed in ("tokenizer_name_or_path", "prompt_tuning_init_text"):
            if from_text and not getattr(self, needed):
                raise ConfigError(f"{name}: prompt_tuning_init='TEXT' needs {needed}; give it or use 'RANDOM'")
        if self.tokenizer_kwargs and not from_text:
            raise ConfigError(f"{name}: tokenizer_kwargs are for prompt_tuning_init='TEXT' only; leave them out")

    def without_effect(self) -> dict[str, str]:
        from_text = self.prompt_tuning_init == "TEXT"
        return (
            {"prompt_tuning_init_text": "prompt_tuning_init='TEXT'"}
            if self.prompt_tuning_init_text and not from_text
            else {}
        )


def initial_embeddings(config: VocabularyPromptConfig, model: nn.Module, total: int) -> Tensor | None:
    """Return the initial embeddings (total, d) that the configuration asks for; None for random numbers."""
    if config.prompt_tuning_init == "SAMPLE_VOCAB":
        size = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        return embeddings_of(model, torch.randint(size, (total,)))
    if config.prompt_tuning_init == "TEXT":
        return embeddings_of(model, _text_tokens(config, total))
    return None


def embeddings_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the model's embeddings (n, d) of tokens (n,), in float32 or float64."""
    table: Any = model.get_input_embeddings()  # type: ignore[operator]
    with torch.no_grad():
        embeddings = table(tokens.to(table.weight.device))
    return embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))


def _text_tokens(config: VocabularyPromptConfig, total: int) -> Tensor:
    from transformers import AutoTokenizer

    options = dict(config.tokenizer_kwargs or {})
    if options.pop("trust_remote_code", False):
        warnings.warn("tokenizer_kwargs: trust_remote_code has no effect; no code of a repository runs", stacklevel=2)
    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path, **options)
    tokens = tokenizer(config.prompt_tuning_init_text)["input_ids"]
    if not tokens:
        raise ConfigError(f"prompt_tuning_init_text {config.prompt_tuning_init_text!r} has no tokens; give more text")
    return torch.tensor((tokens * -(-total // len(tokens)))[:total])
