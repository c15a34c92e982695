"""Adaption prompt (LLaMA-Adapter): gated attention to learned tokens in the top layers. arXiv:2303.16199.

y' = y + g·W_o softmax(q K_Pᵀ/√w) V_P, where K_P = W_k P and V_P = W_v P use the layer's frozen weights and the gate g
starts at zero. For gpt2, HF PEFT omits W_o. Shapes: P (1, n, d), h query heads of width w, k key/value heads, B rows, T
tokens.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore.config import PeftConfig
from peftcore.errors import ConfigError, TargetError
from peftcore.prompts.learner import PromptLearner
from peftcore.registry import register

_SEPARATE = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass
class AdaptionPromptConfig(PeftConfig):
    """Options of the adaption prompt, with HF PEFT's names."""

    size_fields: ClassVar[tuple[str, ...]] = ("adapter_len",)

    target_modules: str | None = None
    """Name of the attention modules; None: all attention modules of a supported form."""
    adapter_len: int | None = None
    """n: number of learned tokens in each layer."""
    adapter_layers: int | None = None
    """Number of layers with a prompt, counted from the top."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive(*(name for name in ("adapter_len", "adapter_layers") if getattr(self, name) is not None))

    def check_complete(self) -> None:
        self.positive("adapter_len", "adapter_layers")


@register("ADAPTION_PROMPT", AdaptionPromptConfig)
class AdaptionPrompt(PromptLearner):
    """Learned tokens and a gate for each of the top attention layers."""

    exclusive = False

    def __init__(self, config: AdaptionPromptConfig, model: nn.Module):
        super().__init__(config, model)
        assert config.adapter_len is not None and config.adapter_layers is not None
        attentions = _attentions(model, config)[-config.adapter_layers :]
        self.paths = [path for path, _ in attentions]
        self.prompts = nn.ParameterList(
            torch.empty(1, config.adapter_len, _width(module), device=next(module.parameters()).device)
            for _, module in attentions
        )
        self.gates = nn.ParameterList(torch.empty(1, device=prompt.device) for prompt in self.prompts)

    @classmethod
    def completed(cls, config: AdaptionPromptConfig, model: nn.Module) -> Any:
        attentions = _attentions(model, config)
        names = {path.rpartition(".")[2] for path, _ in attentions}
        if not attentions:
            raise TargetError(
                f"{type(model).__name__} has no attention module that an adaption prompt supports"
                f"{f' named {config.target_modules!r}' if config.target_modules else ''}; it needs "
                "q_proj, k_proj, v_proj and o_proj with rotary positions (llama, mistral), or gpt2's c_attn"
            )
        if len(attentions) < (config.adapter_layers or 0):
            raise ConfigError(
                f"adapter_layers={config.adapter_layers}, but the model has {len(attentions)} such layers; give fewer"
            )
        return dataclasses.replace(config, target_modules=config.target_modules or names.pop())

    @torch.no_grad()
    def reset_parameters(self, model: nn.Module) -> None:
        for path, prompt, gate in zip(self.paths, self.prompts, self.gates, strict=True):
            dtype = next(model.get_submodule(path).parameters()).dtype  # PEFT draws in the base's type
            prompt.copy_(torch.empty_like(prompt, dtype=dtype if dtype.is_floating_point else None).normal_())
            gate.zero_()

    # -- forward: a hook on each attention module, whose own code and cache are unchanged --------------------

    def attach(self, model: nn.Module, share: Callable[[int], float | Tensor]) -> None:
        for number, path in enumerate(self.paths):
            hook = partial(_attend, self, number, share)
            model.get_submodule(path).register_forward_hook(hook, with_kwargs=True)

    def detach(self, model: nn.Module) -> None:
        for path in self.paths:
            module = model.get_submodule(path)
            for key, hook in list(module._forward_hooks.items()):
                if isinstance(hook, partial) and hook.func is _attend and hook.args[0] is self:
                    del module._forward_hooks[key]
                    module._forward_hooks_with_kwargs.pop(key, None)

    def attended(
        self, number: int, attention: Any, hidden: Tensor, arguments: Mapping[str, Any], by_row: bool = False
    ) -> Tensor:
        """Return the term (B, T, d) that is added to the output of an attention module.

        Args:
            number: Index of the prompt.
            attention: The attention module.
            hidden: Its input (B, T, d).
            arguments: Its keyword arguments.
            by_row: Project the prompt separately for each row, because rows have different adapters on the projections.
        """
        prompt, gate = self.prompts[number].to(hidden.dtype), self.gates[number]
        prompt = prompt.repeat(len(hidden), 1, 1) if by_row else prompt
        queries, keys, values = _projected(attention, hidden, prompt, arguments)
        scores = queries @ keys.transpose(2, 3).to(queries.dtype) / math.sqrt(attention.head_dim)
        weights = gate.to(queries.dtype) * F.softmax(scores, dim=-1, dtype=torch.float32).to(queries.dtype)
        mixed = (weights @ values.to(queries.dtype)).transpose(1, 2).flatten(2)
        if not _is_separate(attention):
            return mixed
        bias = getattr(attention.o_proj, "bias", None)
        return attention.o_proj(mixed) if bias is None else attention.o_proj(mixed) - bias

    # -- disk ------------------------------------------------------------------------------------------------

    def _by_key(self) -> dict[str, Tensor]:
        keys = [f"base_model.model.{path}" for path in self.paths]
        prompts = {f"{key}.adaption_prompt": prompt for key, prompt in zip(keys, self.prompts, strict=True)}
        return prompts | {f"{key}.adaption_gate": gate for key, gate in zip(keys, self.gates, strict=True)}

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        return {key: tensor.detach() for key, tensor in self._by_key().items()}

    @torch.no_grad()
    def load_checkpoint_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        for key, parameter in self._by_key().items():
            parameter.copy_(tensors[key])


def _attend(
    learner: AdaptionPrompt,
    number: int,
    share: Callable[[int], float | Tensor],
    attention: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
) -> Any:
    """Run as forward hook of an attention module: return the output plus the prompt's term; None if inactive."""
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    part = share(len(hidden))
    if not isinstance(part, Tensor) and not part:
        return None
    first, *rest = output if isinstance(output, tuple) else (output,)
    added = learner.attended(number, attention, hidden, kwargs, by_row=isinstance(part, Tensor)).to(first.dtype)
    first = first + (part.to(first)[:, None, None] * added if isinstance(part, Tensor) else added)
    return (first, *rest) if isinstance(output, tuple) else first


def _attentions(model: nn.Module, config: AdaptionPromptConfig) -> list[tuple[str, nn.Module]]:
    """Return (path, attention module) of the layers that can have a prompt, from bottom to top."""
    name = config.target_modules
    return [
        (path, module)
        for path, module in model.named_modules()
        if (_is_separate(module) or _is_fused(module)) and (name is None or path.rpartition(".")[2] == name)
    ]


def _is_separate(module: nn.Module) -> bool:
    """Return True for attention like Llama's; query-key normalisation (`q_norm`) is not supported."""
    rotary = hasattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb")
    return rotary and all(hasattr(module, name) for name in (*_SEPARATE, "head_dim")) and not hasattr(module, "q_norm")


def _is_fused(module: nn.Module) -> bool:
    """Return True for self-attention with a fused projection `c_attn`, as in GPT-2; False for cross-attention."""
    return all(hasattr(module, name) for name in ("c_attn", "c_proj", "split_size", "head_dim")) and not getattr(
        module, "is_cross_attention", False
    )


def _width(attention: Any) -> int:
    return attention.config.hidden_size


def _projected(
    attention: Any, hidden: Tensor, prompt: Tensor, arguments: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the queries (B, h, T, w) of the text and the keys and values (1 or B, h, n, w) of the prompt."""

    def heads(states: Tensor) -> Tensor:
        return states.view(*states.shape[:-1], -1, attention.head_dim).transpose(1, 2)

    if _is_fused(attention):
        queries = attention.c_attn(hidden).split(attention.split_size, dim=2)[0]
        _, keys, values = attention.c_attn(prompt).split(attention.split_size, dim=2)
        return heads(queries), heads(keys), heads(values)
    queries = heads(attention.q_proj(hidden))
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    queries, _ = rotate(queries, queries, *arguments["position_embeddings"])
    keys, values = heads(attention.k_proj(prompt)), heads(attention.v_proj(prompt))
    groups = queries.shape[1] // keys.shape[1]
    return queries, keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
