"""A tiny real task: scikit-learn's handwritten digits as 16 tokens (4 × 4 patches, 17 shades), read by a tiny Llama.

The class is the token after the pixels, so the model is a causal language model of 17 shades and 10 classes. The base
learns upright digits whole; an adapter must then learn transposed ones, with everything else frozen.
"""

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from peftcore import PeftModel

BATCH = 64
SIDE = 4
SHADES = 17
CLASSES = 10
HELD_OUT = 297
WIDTH = 48
IGNORED = -100
TURNS: dict[str, Callable[[Tensor], Tensor]] = {
    "upright": lambda images: images,
    "transposed": lambda images: images.transpose(1, 2),
    "mirrored": lambda images: images.flip(2),
    "flipped": lambda images: images.flip(1),
}


Batch = dict[str, Tensor]
"""`tokens` (n, 17), and whatever else the model's call takes."""


@cache
def digits(turn: str, held_out: bool = False) -> Tensor:
    """Digits turned in one of four ways: shades (n, 16), then the class; the last 297 are held out."""
    data: Any = load_digits()
    images = torch.tensor(data.images).view(-1, SIDE, 2, SIDE, 2).mean((2, 4)).round().long()
    images = TURNS[turn](images)
    rows = slice(-HELD_OUT, None) if held_out else slice(None, -HELD_OUT)
    return torch.cat([images.flatten(1), SHADES + torch.tensor(data.target)[:, None]], 1)[rows]


def batches(turn: str, steps: int, seed: int = 1) -> list[Batch]:
    """One batch for each step; each epoch is in a new order."""
    generator, tokens = torch.Generator().manual_seed(seed), digits(turn)
    made: list[Batch] = []
    while len(made) < steps:
        order = torch.randperm(len(tokens), generator=generator)
        made += [{"tokens": tokens[rows]} for rows in order.split(BATCH) if len(rows) == BATCH]
    return made[:steps]


def two_tasks(steps: int) -> list[Batch]:
    """Batches whose rows are upright (task 0) and transposed (task 1) by turns."""
    task_ids = torch.arange(BATCH) % 2
    pairs = zip(batches("upright", steps), batches("transposed", steps), strict=True)
    return [
        {"tokens": torch.where(task_ids[:, None] == 0, upright["tokens"], transposed["tokens"]), "task_ids": task_ids}
        for upright, transposed in pairs
    ]


# -- the base --------------------------------------------------------------------------------------------------------


def untrained() -> Any:
    """The tiny Llama."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=SHADES + CLASSES,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        pad_token_id=None,
        eos_token_id=None,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


@cache
def base_weights(steps: int = 400) -> dict[str, Tensor]:
    """Weights of the model trained whole on upright digits."""
    net = untrained()
    train(net, batches("upright", steps, seed=0), lr=3e-3)
    return net.state_dict()


def base() -> Any:
    """The trained base."""
    net = untrained()
    net.load_state_dict(base_weights())
    return net


# -- training --------------------------------------------------------------------------------------------------------


def loss_of(net: Any, tokens: Tensor, **inputs: Tensor) -> Tensor:
    """The model's own loss, over the class alone, in nats per digit."""
    labels = tokens.clone()
    labels[:, :-1] = IGNORED
    return net(input_ids=tokens, labels=labels, **inputs).loss


def train(net: Any, batches: list[Batch], lr: float, each: Callable[[int, float], None] | None = None) -> None:
    """Train what is not frozen, one step a batch.

    each: called after a step with its number, from 1, and the seconds of training so far, its own left out.
    """
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=len(batches))
    seconds, adapted = 0.0, isinstance(net, PeftModel)
    for number, batch in enumerate(batches, 1):
        net.train()
        start = time.perf_counter()
        regularizer = net.adapter_regularizer() if adapted else None
        loss = loss_of(net, **batch)
        (loss if regularizer is None else loss + regularizer).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if adapted:
            net.on_optimizer_step(number, optimizer)
        optimizer.zero_grad()
        schedule.step()
        seconds += time.perf_counter() - start
        if each is not None:
            each(number, seconds)


@torch.no_grad()
def judge(net: Any, turn: str = "transposed", task: int | None = None) -> tuple[float, float]:
    """Loss (nats per digit) and accuracy on the digits that are held out."""
    tokens = digits(turn, held_out=True)
    inputs = {} if task is None else {"task_ids": torch.full((len(tokens),), task)}
    pixels, classes = tokens[:, :-1], tokens[:, -1]
    logits = net.eval()(input_ids=pixels, **inputs).logits[:, -1]
    right = logits.argmax(1) == classes
    return nn.functional.cross_entropy(logits, classes).item(), right.float().mean().item()
