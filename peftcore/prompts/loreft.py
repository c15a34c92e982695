"""LoReFT: h' = h + Rᵀ(W h + b − R h) at the output of blocks and some tokens of the prompt, R Rᵀ = I. arXiv:2404.03592.

The tokens are the first and last ones of each row's prompt, without padding. The prompt is the text that `generate`
continues, or the tokens before the first label of a call with labels, or the whole row. Its answer is left alone.
Other forms: `orthogonality=False` is NoReFT, and without `subtract_projection` also DiReFT, h + Rᵀ(W h + b).

HF PEFT has no such method, so only peftcore reads these directories. They hold a matrix A, whose rows R makes
orthonormal: R = L⁻¹A with A Aᵀ = L Lᵀ, so R has the span of A, and equals A at the start.
Shapes: B rows, T tokens, S tokens with those in the cache, d width of the block, r rank, n tokens to change;
h (B, n, d), A, R, W (r, d), b (r,).
"""

import dataclasses
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from peftcore._util.per_thread import PerThread
from peftcore.config import TunerConfig
from peftcore.detection import detect
from peftcore.errors import ConfigError, TargetError, suggestion
from peftcore.kernels.start_values import bias_, kaiming_uniform_
from peftcore.prompts.blocks import chosen_blocks
from peftcore.prompts.cache import cache_of, has_states, is_empty
from peftcore.prompts.learner import PromptLearner, is_encoder_decoder
from peftcore.prompts.placement import check_not_packed, mask_of, tokens_of
from peftcore.registry import register


@dataclass
class LoReftConfig(TunerConfig):
    """LoReFT's options. Its targets are blocks, such as "layers.3"; None: all blocks."""

    r: int = 8
    """Rank of the change (count)."""
    positions: str = "f7+l7"
    """Tokens to change: "f7" for the first 7 of each prompt, "l7" for the last 7, or both; at most half of a prompt."""
    tied_weights: bool = False
    """True: first and last tokens share A, W and b; False: each of the two has its own."""
    orthogonality: bool = True
    """True: the rows of R are orthonormal; False: R is A."""
    subtract_projection: bool = True
    """True: subtract R h, so that the change sets the projection of h on R; False: add to the projection."""
    act_fn: str = "linear"
    """Activation of W h + b: a name of `transformers.activations.ACT2FN`."""
    dropout: float = 0.0
    """Probability of dropping an element of h' in training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("r")
        self.probability("dropout")
        if not any(self.counts()):
            raise ConfigError(
                f"LoReftConfig: positions must name first and last tokens of the prompt; got {self.positions!r}; try "
                "'f7+l7', 'f3' or 'l1'"
            )
        if self.act_fn not in ACT2FN:
            raise ConfigError(f"LoReftConfig: unknown act_fn {self.act_fn!r}{suggestion(self.act_fn, ACT2FN)}")

    def counts(self) -> tuple[int, int]:
        """Return the largest numbers of first and of last tokens that change; zeros for a text that is not valid."""
        match = re.fullmatch(r"(?:f(\d{1,6}))?(\+)?(?:l(\d{1,6}))?", self.positions)
        if match is None or bool(match[2]) != (match[1] is not None and match[3] is not None):
            return 0, 0
        return int(match[1] or 0), int(match[3] or 0)

    def without_effect(self) -> dict[str, str]:
        return (
            {"tied_weights": "positions with first and last tokens"}
            if self.tied_weights and not all(self.counts())
            else {}
        )


class Tokens(NamedTuple):
    """Tokens of one call that change."""

    indices: Tensor
    """Their positions among the call's T tokens (B, n); 0 if not `valid`."""
    valid: Tensor
    """(B, n) bool: False where a prompt is shorter, or the token is not part of the call."""


class Intervention(nn.Module):
    """A, W and b for some tokens of one block.

    Args:
        config: The configuration.
        width: d.
    """

    def __init__(self, config: LoReftConfig, width: int):
        super().__init__()
        self.config, self.activation = config, ACT2FN[config.act_fn]
        self.loreft_A = nn.Parameter(torch.empty(config.r, width))
        self.loreft_W = nn.Parameter(torch.empty(config.r, width))
        self.loreft_b = nn.Parameter(torch.empty(config.r))

    def reset_parameters(self) -> None:
        """Draw start values: of A orthonormal rows, and of W and b as `nn.Linear` does."""
        if self.config.orthogonality:
            drawn = torch.empty(self.loreft_A.shape, device="cpu", dtype=torch.float32)
            self.loreft_A.copy_(nn.init.orthogonal_(drawn))
        else:
            kaiming_uniform_(self.loreft_A)
        kaiming_uniform_(self.loreft_W)
        bias_(self.loreft_b, self.loreft_W)

    def projection(self) -> Tensor:
        """Return R (r, d)."""
        if not self.config.orthogonality:
            return self.loreft_A
        a = self.loreft_A if self.loreft_A.device.type == "mps" else self.loreft_A.double()
        lower = torch.linalg.cholesky(a @ a.T)
        return torch.linalg.solve_triangular(lower, a, upper=False).to(self.loreft_A.dtype)

    def forward(self, h: Tensor) -> Tensor:
        """Return h' (B, n, d) for h, in the wider one of h's and the parameters' types."""
        h = h.to(torch.promote_types(h.dtype, self.loreft_A.dtype))
        r, w, b = (each.to(h.dtype) for each in (self.projection(), self.loreft_W, self.loreft_b))
        source = self.activation(F.linear(h, w, b))
        if self.config.subtract_projection:
            source = source - F.linear(h, r)
        return F.dropout(h + source @ r, self.config.dropout, self.training)


@register("LOREFT", LoReftConfig)
class LoReft(PromptLearner):
    """The interventions of one adapter at all its blocks."""

    exclusive = False
    adapts_blocks = True
    defines_loss = True  # the labels say where the prompt ends
    acts_at_positions = True
    _generated = PerThread(None)
    """(length of the text that `generate` continues, its mask of padding or None); None outside of `generate`."""
    _tokens = PerThread(None)
    """`Tokens` of each intervention in the present call, () if no token changes; None outside of calls."""

    def __init__(self, config: LoReftConfig, model: nn.Module):
        super().__init__(config, model)
        self.paths = _targets(config, model)
        width = detect(model).blocks[0].hidden_size
        if config.r > width:
            raise ConfigError(f"LOREFT: r must be at most the width {width} of the blocks; got {config.r}")
        first, last = config.counts()
        self.names = (
            ("both",) if config.tied_weights and first and last else ("first",) * bool(first) + ("last",) * bool(last)
        )
        self.blocks: Any = nn.ModuleList(
            nn.ModuleDict({name: Intervention(config, width) for name in self.names}).to(_device(model, path))
            for path in self.paths
        )

    @classmethod
    def completed(cls, config: LoReftConfig, model: nn.Module) -> LoReftConfig:
        if is_encoder_decoder(model):
            raise ConfigError(
                f"LOREFT adapts models with one stack of blocks; {type(model).__name__} has an encoder and a decoder; "
                "take another method, such as LoraConfig"
            )
        return dataclasses.replace(config, target_modules=set(_targets(config, model)))

    @classmethod
    def forward_arguments(cls, config: Any) -> frozenset[str]:
        return frozenset({"prompt_lengths"})

    @torch.no_grad()
    def reset_parameters(self, model: nn.Module) -> None:
        for block in self.blocks:
            for intervention in block.values():
                intervention.reset_parameters()

    # -- forward: a hook on each block -----------------------------------------------------------------------

    def attach(self, model: nn.Module, share: Callable[[int], float | Tensor]) -> None:
        for number, path in enumerate(self.paths):
            model.get_submodule(path).register_forward_hook(partial(_intervene, self, number, share))

    def detach(self, model: nn.Module) -> None:
        for path in self.paths:
            hooks = model.get_submodule(path)._forward_hooks
            for key, hook in list(hooks.items()):
                if isinstance(hook, partial) and hook.func is _intervene and hook.args[0] is self:
                    del hooks[key]

    def begin_generation(self, arguments: Mapping[str, Any]) -> None:
        text = next((arguments[key] for key in ("inputs_embeds", "input_ids", "inputs") if key in arguments), None)
        mask = mask_of(dict(arguments), "attention_mask")
        self._generated = None if text is None else (text.shape[1], mask)

    def end_generation(self) -> None:
        self._generated = None

    def before_forward(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        text, cache, lengths = tokens_of(inputs), cache_of(model, inputs), inputs.get("prompt_lengths")
        if has_states(inputs, cache):  # decoding: the prompt is in the states
            self._tokens = ()
            return
        past = 0 if is_empty(cache) else int(cache.get_seq_length())
        end = past + text.shape[1]
        generated: Any = self._generated
        width, mask = generated or (0 if past else end, None)
        if past >= width and (generated or lengths is None):  # decoding, or the text of a filled cache goes on
            self._tokens = ()
            return
        if past == 0:
            check_not_packed(inputs)
        mask = mask_of(inputs, "attention_mask") if mask is None else mask
        real = torch.ones(len(text), max(end, width)) if mask is None else mask
        if real.shape[1] < (width or end):
            raise ConfigError(
                f"LOREFT finds the prompt's tokens by the attention mask, which has {real.shape[1]} of {width or end} "
                "tokens; give the mask of the whole prompt"
            )
        real = _by_row(real, text, "attention_mask") != 0
        if lengths is not None:
            lengths = _by_row(lengths, text, "prompt_lengths")
        else:
            lengths = self._lengths(model, real[:, :width], inputs)
        self._tokens = tuple(self._chosen(real, lengths, past, end))

    def _lengths(self, model: Any, real: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """Return the tokens of each row's prompt (B,): those before its first label, or all tokens without labels.

        Args:
            model: The model. Only the labels of a model that generates say where an answer begins.
            real: (B, T) bool: False for padding.
            inputs: The arguments of the call.
        """
        labels = inputs.get("labels")
        generates = callable(getattr(model, "can_generate", None)) and model.can_generate()
        if self._generated or not generates or not isinstance(labels, Tensor) or labels.shape != real.shape:
            if generates and self.training and labels is None and not self._generated:
                warnings.warn(
                    "LOREFT takes the whole row as prompt, because this call in training mode has no labels; give "
                    "labels, or prompt_lengths with the tokens of each row's prompt",
                    stacklevel=2,
                )
            return real.sum(1)
        before = real & ((labels != -100).to(real.device).cumsum(1) == 0)
        return torch.where(before.any(1), before.sum(1), real.sum(1))

    def _chosen(self, real: Tensor, lengths: Tensor, past: int, end: int) -> Iterator[Tokens]:
        """Yield the tokens of each intervention.

        Args:
            real: (B, S) bool: False for padding.
            lengths: Tokens of each row's prompt (B,), padding not counted.
            past: Tokens in the cache (count).
            end: Tokens in the cache and the call (count).
        """
        order = torch.argsort((~real).long(), dim=1, stable=True)  # the row's tokens first, then its padding
        half, lengths = (lengths // 2)[:, None], lengths[:, None]
        parts = []
        for is_last, count in enumerate(self.config.counts()):
            if count:
                rank = torch.arange(min(count, order.shape[1]), device=order.device).expand(len(order), -1)
                valid = rank < half
                rank = lengths - 1 - rank if is_last else rank
                column = order.gather(1, rank.clamp(0, order.shape[1] - 1))
                valid = valid & (column >= past) & (column < end)
                parts.append(Tokens(torch.where(valid, column - past, 0), valid))
        if len(parts) > len(self.names):
            parts = [Tokens(*(torch.cat(each, 1) for each in zip(*parts, strict=True)))]
        yield from parts

    def changed(self, number: int, hidden: Tensor, share: float | Tensor) -> Tensor:
        """Return a block's output (B, T, d) with the interventions.

        Args:
            number: Index of the block among `paths`.
            hidden: The output (B, T, d).
            share: Weight of the change, for all rows or (B,).
        """
        if self._tokens is None:
            raise ConfigError(
                "LOREFT needs a call of the whole model, whose arguments say where the prompt ends; call the "
                "model that get_peft_model returned, not a part of it"
            )
        if isinstance(share, Tensor):
            share = share.to(hidden.device)[:, None, None]
        changed, rows = hidden, torch.arange(len(hidden), device=hidden.device)[:, None]
        for name, tokens in zip(self.names, self._tokens, strict=False):  # no tokens: no change
            indices, valid = tokens.indices.to(hidden.device), tokens.valid.to(hidden.device)[..., None]
            h = hidden[rows, indices]
            change = torch.where(valid, share * (self.blocks[number][name](h) - h), 0)
            changed = changed.index_put((rows, indices), change.to(hidden.dtype), accumulate=True)
        return changed

    # -- disk ------------------------------------------------------------------------------------------------

    def _by_key(self) -> Iterator[tuple[str, Tensor]]:
        for path, block in zip(self.paths, self.blocks, strict=True):
            for name, tensor in block.state_dict().items():
                yield f"base_model.model.{path}.{name}", tensor

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        return {key: tensor.detach() for key, tensor in self._by_key()}

    @torch.no_grad()
    def load_checkpoint_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        for key, tensor in self._by_key():
            tensor.copy_(tensors[key])

    def after_forward(self, outputs: Any) -> Any:
        self._tokens = None
        return outputs


def _intervene(
    learner: LoReft, number: int, share: Callable[[int], float | Tensor], _block: Any, _args: Any, output: Any
) -> Any:
    """Run as forward hook of a block: return its output with the change; None if the adapter is not in effect."""
    first, *rest = output if isinstance(output, tuple) else (output,)
    part = share(len(first))
    if (not isinstance(part, Tensor) and not part) or learner._tokens == ():
        return None
    changed = learner.changed(number, first, part)
    return (changed, *rest) if isinstance(output, tuple) else changed


def _by_row(values: Any, text: Tensor, name: str) -> Tensor:
    """Return values with one entry for each row of the text; those of beams, which are adjacent, are repeated."""
    values = torch.as_tensor(values, device=text.device)
    if not values.dim() or not len(values) or len(text) % len(values):
        raise ConfigError(
            f"LOREFT: {name} must have an entry for each of the {len(text)} rows; got {list(values.shape)}"
        )
    return values.repeat_interleave(len(text) // len(values), 0)


def _targets(config: LoReftConfig, model: nn.Module) -> list[str]:
    """Return the paths of the blocks to adapt, in order."""
    blocks = detect(model).blocks
    if not blocks:
        raise TargetError(f"LOREFT adapts the output of blocks, and {type(model).__name__} has no list of blocks")
    paths = blocks[0].paths
    return [paths[number] for number in chosen_blocks(config, paths)]


def _device(model: nn.Module, path: str) -> torch.device:
    return next(model.get_submodule(path).parameters()).device
