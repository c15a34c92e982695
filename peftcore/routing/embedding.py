"""Text embeddings from a transformers encoder such as MiniLM: the mean of the last hidden states over the text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class TextEmbedder:
    """An encoder that turns texts into vectors.

    Args:
        folder: encoder and tokenizer in transformers' format.
        batch_size: texts per forward pass (count).
        max_length: tokens per text (count); longer texts are truncated.
    """

    def __init__(self, folder: str | Path, batch_size: int = 32, max_length: int = 256):
        from transformers import AutoModel, AutoTokenizer

        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self._model: Any = AutoModel.from_pretrained(folder, local_files_only=True).eval()
        self._batch_size, self._max_length = batch_size, max_length

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return the vectors (n, d) of n texts in order: one row per text, not normalised, in the encoder's dtype."""
        vectors = []
        for first in range(0, len(texts), self._batch_size):
            inputs = self._tokenizer(
                list(texts[first : first + self._batch_size]),
                padding=True,
                truncation=True,
                max_length=self._max_length,
                return_tensors="pt",
            )
            hidden = self._model(**inputs).last_hidden_state
            mask = inputs["attention_mask"][..., None].to(hidden)
            vectors.append((hidden * mask).sum(1) / mask.sum(1))
        return torch.cat(vectors) if vectors else torch.empty(0, self._model.config.hidden_size)
