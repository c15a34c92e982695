"""CPT: a prompt of example tokens with bounded changes δ of their embeddings, [E(c) + δ; E(x)]. arXiv:2410.17222.

The bound is ‖δ_i‖ ≤ ε_i. Token types, modulo 4: 1 and 3 are templates (ε of the format), 2 is an example's input (ε of
the input), 0 is a label, whose embedding is fixed. The loss covers the labels of examples and text, (1/N) Σ w_t nll_t;
with "decay" earlier examples weigh less. Both ε apply to a width of 2048 and are scaled by √(d/2048).
Shapes: c (n,), δ (n, d), B rows, T text tokens.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore._util.per_thread import PerThread
from peftcore.config import PromptLearningConfig, TaskType
from peftcore.errors import ConfigError
from peftcore.kernels.start_values import normal_
from peftcore.prompts.learner import embedding_of
from peftcore.prompts.placement import mask_of, placement
from peftcore.prompts.virtual_tokens import IGNORED, VirtualTokens
from peftcore.prompts.vocabulary import embeddings_of
from peftcore.registry import register

_FIXED = 1e-10
"""ε of a label token, as in HF PEFT."""


@dataclass
class CPTConfig(PromptLearningConfig):
    """Options of CPT, with HF PEFT's names."""

    cpt_token_ids: list[int] | None = None
    """Token ids of the examples; None: [0]."""
    cpt_mask: list[int] | None = None
    """One number per token, saved for HF PEFT; its values have no effect, as there."""
    cpt_tokens_type_mask: list[int] | None = None
    """Type of each token; None: templates."""
    opt_weighted_loss_type: str = "none"
    """"none", or "decay": an example's label weighs opt_loss_decay_factor times the next example's label."""
    opt_loss_decay_factor: float = 1.0
    """Weight of an example's label relative to the next one's, with "decay"."""
    opt_projection_epsilon: float = 0.1
    """ε of input tokens."""
    opt_projection_format_epsilon: float = 0.1
    """ε of template tokens."""
    tokenizer_name_or_path: str | None = None
    """Saved for HF PEFT."""

    def __post_init__(self) -> None:
        self._check_types()
        self.cpt_token_ids = [0] if self.cpt_token_ids is None else list(self.cpt_token_ids)
        fixed = {"num_virtual_tokens": len(self.cpt_token_ids), "num_transformer_submodules": 1}
        for name, value in fixed.items():
            if getattr(self, name) not in (None, value):
                raise ConfigError(
                    f"CPTConfig: {name} must be {value}, for {len(self.cpt_token_ids)} tokens of a decoder; got "
                    f"{getattr(self, name)}; leave it out"
                )
            setattr(self, name, value)
        self.cpt_mask = self.cpt_mask or [1] * len(self.cpt_token_ids)
        self.cpt_tokens_type_mask = self.cpt_tokens_type_mask or [1] * len(self.cpt_token_ids)
        super().__post_init__()
        self.one_of("opt_weighted_loss_type", self.opt_weighted_loss_type, ("none", "decay"))
        if self.task_type not in (None, TaskType.CAUSAL_LM):
            raise ConfigError(f"CPTConfig is for task_type='CAUSAL_LM'; got {TaskType(self.task_type).value!r}")
        lengths = [len(self.cpt_token_ids), len(self.cpt_mask), len(self.cpt_tokens_type_mask)]
        if len(set(lengths)) > 1:
            raise ConfigError(
                f"CPTConfig: cpt_token_ids, cpt_mask and cpt_tokens_type_mask must be equally long; got {lengths}"
            )

    def without_effect(self) -> dict[str, str]:
        unused = self.opt_loss_decay_factor != 1 and self.opt_weighted_loss_type != "decay"
        return {"opt_loss_decay_factor": "opt_weighted_loss_type='decay'"} if unused else {}


class _Fixed(nn.Module):
    """Rows (n, d) that never train.

    Args:
        values: the rows.
    """

    weight: Tensor

    def __init__(self, values: Tensor):
        super().__init__()
        self.register_buffer("weight", values)


@register("CPT", CPTConfig)
class Cpt(VirtualTokens):
    """A prompt of example tokens whose embeddings move within small balls."""

    _targets = PerThread()
    """Arguments of `_loss` besides the logits, for this call; None for a call without labels."""

    def __init__(self, config: CPTConfig, model: nn.Module):
        super().__init__(config, model)
        self.embedding = _Fixed(torch.empty(self.count, self.width))
        self.delta_embedding: nn.Embedding | None = embedding_of(torch.zeros(self.count, self.width))

    @torch.no_grad()
    def reset_parameters(self, model: nn.Module) -> None:
        for _ in range(2):  # PEFT draws two embeddings and overwrites both
            normal_(self.vectors)
        self.vectors.copy_(embeddings_of(model, torch.tensor(self.config.cpt_token_ids)))

    # -- the prompt ------------------------------------------------------------------------------------------

    @property
    def types(self) -> Tensor:
        """Token types of the prompt (n,)."""
        return torch.tensor(self.config.cpt_tokens_type_mask, device=self.vectors.device)

    def radii(self) -> Tensor:
        """Return ε of each token (n, 1)."""
        scale = math.sqrt(self.vectors.shape[1] / 2048)
        of_format, of_input = self.config.opt_projection_format_epsilon, self.config.opt_projection_epsilon
        by_type = torch.tensor([_FIXED, of_format * scale, of_input * scale, of_format * scale])
        return by_type.to(self.vectors)[self.types.clamp(min=0) % 4].unsqueeze(1)

    def projected(self) -> Tensor:
        """Return δ (n, d), projected into the balls."""
        assert self.delta_embedding is not None
        delta, radii = self.delta_embedding.weight.detach(), self.radii()
        return delta * (radii / delta.norm(dim=1, keepdim=True).clamp(min=radii))

    def encoded(self) -> Tensor:
        if self.delta_embedding is None:
            return self.vectors
        if torch.is_grad_enabled() and self.delta_embedding.weight.requires_grad:
            with torch.no_grad():  # projected gradient descent: the last optimiser step may have left the ball
                self.delta_embedding.weight.copy_(self.projected())
            free = (self.types % 4 != 0).unsqueeze(1)
            return self.vectors + torch.where(free, self.delta_embedding.weight, self.delta_embedding.weight.detach())
        return self.vectors + self.projected()

    def has_encoder(self) -> bool:
        return self.delta_embedding is not None

    def drop_encoder(self, encoded: Tensor) -> None:
        self.delta_embedding = None
        self.vectors.copy_(encoded)

    # -- the loss --------------------------------------------------------------------------------------------

    @classmethod
    def forward_arguments(cls, config: Any) -> frozenset[str]:
        return frozenset({"input_type_mask"})

    def before_forward(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        labels, types = inputs.get("labels"), inputs.get("input_type_mask")
        token_placement = placement(mask_of(inputs, "attention_mask"), self.count)
        super().before_forward(model, inputs)
        self._targets = None
        if labels is None:
            return
        text = torch.full_like(labels, 4) if types is None else types.to(labels.device).long()
        prompt_types = self.types.to(labels.device).expand(len(labels), -1)
        # example numbers in the text's token types continue after the prompt's
        before = prompt_types.max().clamp(min=0).add(3) // 4 * 4
        types = token_placement.insert(prompt_types, torch.where(text > 0, text + before, text))
        tokens = torch.tensor(self.config.cpt_token_ids, device=labels.device).expand(len(labels), -1)
        targets = token_placement.insert(tokens, labels).masked_fill((types <= 0) | (types % 4 != 0), IGNORED)
        inputs["labels"] = targets
        self._targets = {"labels": targets, "types": types, "items": inputs.get("num_items_in_batch"), "text": labels}

    def after_forward(self, outputs: Any) -> Any:
        targets, self._targets = self._targets, None
        if not targets:
            return outputs
        if isinstance(outputs, tuple):
            return (self._loss(outputs[1], **targets), *outputs[1:])
        outputs["loss"] = self._loss(outputs["logits"], **targets)
        return outputs

    def _loss(self, logits: Tensor, labels: Tensor, types: Tensor, items: Any, text: Tensor) -> Tensor:
        """Return the weighted mean loss; with gradient accumulation, this call's share of `items` text labels."""
        labels, types = labels[:, 1:].to(logits.device), types[:, 1:].to(logits.device)
        rows = logits[:, :-1].float().flatten(0, 1)  # each token's logits are contiguous; (B, V, T) is slow on the CPU
        losses = F.cross_entropy(rows, labels.flatten(), ignore_index=IGNORED, reduction="none").view_as(labels)
        supervised = labels != IGNORED
        loss = (losses * self.weights(types) * supervised).sum() / supervised.sum()
        return loss if items is None else loss * (text[:, 1:] != IGNORED).sum() / items

    def weights(self, types: Tensor) -> Tensor:
        """Return the weight of each token (B, ·): 1 for the last label, times the decay factor per earlier label."""
        weights = torch.ones(types.shape, device=types.device)
        if self.config.opt_weighted_loss_type == "decay":
            for row, row_types in zip(weights, types, strict=True):
                labels = row_types[
                    (row_types > 0) & (row_types % 4 == 0)
                ].unique()  # in ascending order, one number for each label
                for age, label in enumerate(labels.flip(0)):
                    row[row_types == label] = self.config.opt_loss_decay_factor**age
        return weights
