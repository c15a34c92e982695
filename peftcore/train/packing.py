"""Packing: several documents in one row, without padding, and without attention between documents.

A packed row has no attention mask. Its position ids restart at 0 in each document. From them transformers derives a
block-diagonal causal mask (eager, SDPA, flex) or the sequence bounds of variable-length kernels (flash). This works
only without a key/value cache, so a packed row has `use_cache=False`.

Shapes: T tokens of all documents of a row.
"""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler

from peftcore.bases.quantized import keep_quantized_weights_trainable
from peftcore.detection import detect
from peftcore.errors import TrainingError
from peftcore.injection.adapter_set import adapter_set
from peftcore.model import PeftModel
from peftcore.train.batches import WEIGHT, row_weights
from peftcore.train.losses import IGNORED
from peftcore.train.model_loss import has_causal_loss

Row = Mapping[str, Any]
"""{"input_ids", "labels"}: token ids of one document; optional "weight": weight of each of its tokens."""


@dataclass
class PackedCollator:
    """Collator of documents, or packs of documents, into one row.

    A document's first token gets no label, because the token before it belongs to another document.

    Args:
        varlen: Also return the documents' bounds, which flash attention would else compute in every layer.
    """

    varlen: bool = False

    def __call__(self, rows: Sequence[Row | Sequence[Row]]) -> dict[str, Any]:
        """Return `input_ids`, `labels`, `position_ids` and, if a document has one, `weight`, each (1, T)."""
        documents = [one for row in rows for one in ([row] if isinstance(row, Mapping) else row)]
        lengths = [len(document["input_ids"]) for document in documents]
        labels = [torch.tensor(document["labels"]) for document in documents]
        for label in labels:
            label[:1] = IGNORED
        batch: dict[str, Any] = {
            "input_ids": torch.cat([torch.tensor(document["input_ids"]) for document in documents])[None],
            "labels": torch.cat(labels)[None],
            "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
            "use_cache": False,
        }
        if any(WEIGHT in document for document in documents):
            batch[WEIGHT] = row_weights(documents).repeat_interleave(torch.tensor(lengths))[None]
        if self.varlen:
            bounds = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
            batch |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
            batch |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
        return batch


class PackSampler(Sampler[tuple[int, ...]]):
    """Packs of row indices by best-fit decreasing bin packing; each row occurs once an epoch.

    Packs and their order depend only on (seed, epoch), and each epoch has the same number of packs, so a resumed run
    continues at the same pack.

    Args:
        lengths: Tokens in each row.
        tokens: Most tokens in a pack.
        seed: Seed of packs and order.

    Raises:
        TrainingError: A row has more than `tokens` tokens.
    """

    def __init__(self, lengths: Sequence[int], tokens: int, seed: int = 0) -> None:
        longest = max(lengths, default=0)
        if longest > tokens:
            raise TrainingError(
                f"a row of {longest} tokens does not fit a pack of {tokens}; give packs at least {longest} tokens, or "
                "shorten the rows"
            )
        self.seed = seed
        self.epoch = 0
        self._rows_of: dict[int, list[int]] = defaultdict(list)
        for row, length in enumerate(lengths):
            self._rows_of[length].append(row)
        self._profiles = _best_fit([n for n in sorted(self._rows_of, reverse=True) for _ in self._rows_of[n]], tokens)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch (from 0) whose packs are drawn next; the trainer calls this method."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._profiles)

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        # Rows of equal length are exchanged, so packs are as full as in every epoch but hold other rows.
        left = {n: [rows[i] for i in _shuffled(len(rows), generator)] for n, rows in self._rows_of.items()}
        packs = [tuple(left[length].pop() for length in profile) for profile in self._profiles]
        return iter([packs[i] for i in _shuffled(len(packs), generator)])


def _shuffled(count: int, generator: torch.Generator) -> list[int]:
    return torch.randperm(count, generator=generator).tolist()


def _best_fit(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Return bins of lengths (sorted, longest first); each length goes into the fullest bin that has room for it."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, number of the bin), sorted
    for length in lengths:
        at = bisect_left(room, (length, -1))
        if at == len(room):
            bins.append([])
            left, number = tokens, len(bins) - 1
        else:
            left, number = room.pop(at)
        bins[number].append(length)
        if left > length:
            insort(room, (left - length, number))
    return bins


class Packs(Dataset[list[Row]]):
    """Training set for AdapterTrainer in packs of at most `tokens` tokens, for use with PackedCollator.

    With `per_device_train_batch_size=1` each forward pass is one pack; with more, several packs are one row.

    Args:
        rows: A sequence of rows, such as a list or a datasets.Dataset.
        tokens: Most tokens in a pack.
    """

    def __init__(self, rows: Any, tokens: int) -> None:
        self.rows = rows
        self.lengths = [len(ids) for ids in _column(rows, "input_ids")]
        self.tokens = tokens
        self._count = len(PackSampler(self.lengths, tokens))

    def __len__(self) -> int:
        """Return the number of packs in an epoch."""
        return self._count

    def __getitem__(self, pack: tuple[int, ...]) -> list[Row]:
        return [self.rows[row] for row in pack]

    def sampler(self, seed: int) -> PackSampler:
        """Return a sampler of packs: tuples of row indices, each of which is an index into this dataset."""
        return PackSampler(self.lengths, self.tokens, seed)


def _column(rows: Any, name: str) -> Any:
    return rows[name] if name in (getattr(rows, "column_names", None) or ()) else [row[name] for row in rows]


# -- packable models -------------------------------------------------------------------------------------------------


def uses_flash_attention(model: nn.Module) -> bool:
    """Return True if the model's attention accepts the documents' bounds."""
    return "flash" in str(getattr(getattr(model, "config", None), "_attn_implementation", ""))


def check_packable(model: nn.Module) -> None:
    """Check that a model's outputs for documents in a packed row equal those for each document alone.

    The check looks at the architecture, then compares logits of two short documents, packed and one by one.

    Raises:
        TrainingError: The model does not support packed rows.
    """
    instead = "train on padded rows, with RightPaddingCollator"
    family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    active = adapter_set(model).prompts_in_effect() if isinstance(model, PeftModel) else []
    prompts = [type(prompt).__name__ for prompt in active]
    if prompts:
        raise TrainingError(
            f"{' and '.join(prompts)} inserts virtual tokens before a row, not before each packed document; {instead}"
        )
    if not has_causal_loss(model):
        raise TrainingError(f"packed rows need a causal language model; {family} is not one; {instead}")
    if not detect(model).packable:
        raise TrainingError(
            f"{family} has a recurrent state, which would leak from one document of a packed row to the next; {instead}"
        )
    difference, tolerance = _difference_when_packed(model)
    if not difference <= tolerance:
        raise TrainingError(
            f"{family} does not separate the documents of a packed row: its logits differ by {difference:.1%} from "
            f"those of the documents alone, more than rounding ({tolerance:.1%}); {instead}"
        )


@torch.no_grad()
def _difference_when_packed(model: nn.Module) -> tuple[float, float]:
    """Return the RMS change of the logits by packing, and its bound from rounding, relative to the logits' RMS."""
    embedding = cast(Any, model).get_input_embeddings()
    words, device = embedding.num_embeddings, next(embedding.parameters()).device
    tokens = [(torch.arange(1, 1 + length) * step) % words for length, step in ((9, 7), (14, 11))]
    rows: list[Row] = [{"input_ids": ids.tolist(), "labels": ids.tolist()} for ids in tokens]
    collate = PackedCollator(uses_flash_attention(model))

    def logits(rows: list[Row]) -> Tensor:
        inputs = {name: value for name, value in collate(rows).items() if name != "labels"}
        on_device = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in inputs.items()}
        return model(**on_device).logits

    keep_quantized_weights_trainable(model)  # eval mode would repack quantised weights permanently
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        packed, alone = logits(rows), torch.cat([logits([row]) for row in rows], 1)
    finally:
        for module, was in training.items():
            module.training = was
    change = (packed - alone).float().square().mean().sqrt() / alone.float().square().mean().sqrt()
    # Some families compute attention in float32 for any dtype of their inputs.
    return change.item(), max(torch.finfo(alone.dtype).eps, torch.finfo(torch.float32).eps) ** 0.5
