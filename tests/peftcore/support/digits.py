"""A tiny real task: scikit-learn's handwritten digits as sequences of 16 tokens (4 × 4 patches, 17 shades), read by a tiny Llama.

The base learns upright digits whole; an adapter must then learn transposed ones, with everything else frozen.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForSequenceClassification

BATCH = 64
SHADES = 17
HELD_OUT = 297


@dataclass(frozen=True)
class Digits:
    """Rows of token ids (n, 16) and classes (n,)."""

    pixels: Tensor
    classes: Tensor

    def batches(self, steps: int, seed: int) -> list[tuple[Tensor, Tensor]]:
        """`steps` batches, each epoch in a new order."""
        generator = torch.Generator().manual_seed(seed)
        made: list[tuple[Tensor, Tensor]] = []
        while len(made) < steps:
            order = torch.randperm(len(self.classes), generator=generator)
            made += [(self.pixels[rows], self.classes[rows]) for rows in order.split(BATCH) if len(rows) == BATCH]
        return made[:steps]


@cache
def digits(transposed: bool, held_out: bool = False) -> Digits:
    """The digits; the last 297 are held out."""
    data: Any = load_digits()
    images = torch.tensor(data.images).long()
    images = images.view(-1, 4, 2, 4, 2).float().mean((2, 4)).round().long()  # 16 tokens instead of 64
    images = images.transpose(1, 2) if transposed else images
    rows = slice(-HELD_OUT, None) if held_out else slice(None, -HELD_OUT)
    return Digits(images.flatten(1)[rows].contiguous(), torch.tensor(data.target)[rows])


def model() -> Any:
    """The tiny Llama, untrained."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=SHADES,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_labels=10,
        pad_token_id=None,
        eos_token_id=None,
        bos_token_id=None,
    )
    made = LlamaForSequenceClassification(config)
    made.config.pad_token_id = 0
    return made


@cache
def base_weights(steps: int = 400) -> dict[str, Tensor]:
    """Weights of the model trained whole on upright digits."""
    whole = model()
    optimizer = torch.optim.AdamW(whole.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for pixels, classes in digits(False).batches(steps, seed=0):
        optimizer.zero_grad()
        loss_of(whole, pixels, classes).backward()
        nn.utils.clip_grad_norm_(whole.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return whole.state_dict()


def base() -> Any:
    """The trained base."""
    made = model()
    made.load_state_dict(base_weights())
    return made


def loss_of(net: Any, pixels: Tensor, classes: Tensor) -> Tensor:
    """Cross-entropy of the class read at the last pixel, in nats per digit."""
    logits = net(input_ids=pixels, attention_mask=torch.ones_like(pixels)).logits
    return nn.functional.cross_entropy(logits.float(), classes)


@torch.no_grad()
def held_out_loss(net: Any, transposed: bool = True) -> float:
    """Loss on digits that were not trained on."""
    net.eval()
    rows = digits(transposed, held_out=True)
    return loss_of(net, rows.pixels, rows.classes).item()


@dataclass(frozen=True)
class Curve:
    """What training showed: losses by step, seconds at each step."""

    losses: list[float]
    seconds: list[float]
    before: float
    after: float
    """Held-out loss before and after."""
    trainable: int


def learn(net: Any, lr: float, steps: int, each: Callable[[int], None] | None = None) -> Curve:
    """Train an adapted model on transposed digits."""
    before = held_out_loss(net)
    net.train()
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    losses, seconds, start = [], [], time.perf_counter()
    for step, (pixels, classes) in enumerate(digits(True).batches(steps, seed=1), 1):
        optimizer.zero_grad()
        loss = loss_of(net, pixels, classes)
        regularizer = net.adapter_regularizer()
        (loss if regularizer is None else loss + regularizer).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        net.on_optimizer_step(step, None)
        schedule.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
        if each is not None:
            each(step)
    trainable = sum(p.numel() for p in parameters)
    return Curve(losses, seconds, before, held_out_loss(net), trainable)
