"""A tiny real task: scikit-learn's handwritten digits as 16 tokens (4 × 4 patches, 17 shades), read by a tiny Llama.

The class is the token after the pixels, so the model is a causal language model of 17 shades and 10 classes. The base
learns upright digits whole; an adapter must then learn transposed ones, with everything else frozen.
"""

import time
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

BATCH = 64
SIDE = 4
SHADES = 17
CLASSES = 10
HELD_OUT = 297
WIDTH = 48
IGNORED = -100


@dataclass(frozen=True)
class Digits:
    """Rows of tokens: shades (n, 16) and, after them, the class (n, 1), as one (n, 17)."""

    tokens: Tensor

    def batches(self, steps: int, seed: int = 1) -> list[Tensor]:
        """`steps` batches, each epoch in a new order."""
        generator = torch.Generator().manual_seed(seed)
        made: list[Tensor] = []
        while len(made) < steps:
            order = torch.randperm(len(self.tokens), generator=generator)
            made += [self.tokens[rows] for rows in order.split(BATCH) if len(rows) == BATCH]
        return made[:steps]


@cache
def digits(turn: str, held_out: bool = False) -> Digits:
    """The digits "upright", "transposed" or "mirrored"; the last 297 are held out."""
    data: Any = load_digits()
    images = torch.tensor(data.images).view(-1, SIDE, 2, SIDE, 2).mean((2, 4)).round().long()
    images = {"upright": images, "transposed": images.transpose(1, 2), "mirrored": images.flip(2)}[turn]
    rows = slice(-HELD_OUT, None) if held_out else slice(None, -HELD_OUT)
    return Digits(torch.cat([images.flatten(1), SHADES + torch.tensor(data.target)[:, None]], 1)[rows])


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
    train(net, digits("upright").batches(steps, seed=0), lr=3e-3)
    return net.state_dict()


def base() -> Any:
    """The trained base."""
    net = untrained()
    net.load_state_dict(base_weights())
    return net


# -- training --------------------------------------------------------------------------------------------------------


def loss_of(net: Any, tokens: Tensor, **inputs: Any) -> Tensor:
    """The model's own loss over the class alone, in nats per digit."""
    labels = tokens.clone()
    labels[:, :-1] = IGNORED
    return net(input_ids=tokens, labels=labels, **inputs).loss


def train(net: Any, batches: list[Tensor], lr: float) -> None:
    """Train what is not frozen, without an adapter's own work."""
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=len(batches))
    for tokens in batches:
        step(net.train(), optimizer, loss_of(net, tokens))
        schedule.step()


def step(net: Any, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_([p for p in net.parameters() if p.requires_grad], 1.0)
    optimizer.step()


@torch.no_grad()
def held_out(net: Any, turn: str = "transposed", **inputs: Any) -> tuple[float, float]:
    """Loss (nats per digit) and accuracy on digits that were not trained on."""
    tokens = digits(turn, held_out=True).tokens
    logits = net.eval()(input_ids=tokens[:, :-1], **inputs).logits[:, -1]
    return nn.functional.cross_entropy(logits, tokens[:, -1]).item(), (logits.argmax(1) == tokens[:, -1]).float().mean().item()
