"""X-LoRA: y = Wx + b + Σ_n s_tln ΔW_n x, trained LoRAs n weighted for each token t and layer l. arXiv:2402.07148.

The weights s come from a classifier over the last hidden states of a first pass, in which every s is
`scaling_pass_value`. So each call runs the model twice, and `generate` works without a cache.
Shapes: b rows, t tokens, l adapted layers, n LoRAs; s (b, t, l, n).
PEFT never saves the LoRAs, even if they train; here they are saved under the keys of PEFT's model, which PEFT reads.
Convolutions are not adapted, because their positions are not tokens.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftcore.adapter import Adapter
from peftcore.bases import BaseWeight
from peftcore.errors import ConfigError, MergeError, TargetError
from peftcore.files.tensors import read_tensors
from peftcore.methods.xlora.config import XLoraConfig
from peftcore.methods.xlora.experts import lora_paths
from peftcore.methods.xlora.mixture import Mixture
from peftcore.registry import register


@register("XLORA", XLoraConfig)
class XLora(Adapter):
    """The LoRAs of one layer, weighted."""

    layer_kinds = frozenset({"linear", "embedding"})
    generate_arguments: ClassVar[Mapping[str, Any]] = {"use_cache": False}
    shared: Mixture

    def __init__(self, config: XLoraConfig, base: BaseWeight, path: str):
        super().__init__(config, base, path)
        self.config, self.path = config, path

    @classmethod
    def default_targets(cls, config: XLoraConfig, model: nn.Module, layers: Mapping[str, nn.Module]) -> list[str]:
        found = {path: d for d in config.directories() for path in lora_paths(read_tensors(d), d)}
        if absent := sorted(found.keys() - layers.keys()):
            raise TargetError(
                f"XLORA: {found[absent[0]]} adapts {absent[0]}, which {type(model).__name__} does not have; give LoRAs "
                "that were trained on this base"
            )
        return [path for path in layers if path in found]

    @classmethod
    def make_shared(cls, config: XLoraConfig, bases: Mapping[str, BaseWeight]) -> Mixture:
        return Mixture(config, bases)

    def reset_parameters(self) -> None:
        """Do nothing: the layer has no parameters of its own."""

    @classmethod
    def forward_arguments(cls, config: XLoraConfig) -> frozenset[str]:
        return frozenset()

    @classmethod
    def before_forward(
        cls, config: XLoraConfig, adapters: Mapping[str, Adapter], model: nn.Module, inputs: dict[str, Any]
    ) -> None:
        shared: Mixture = next(iter(adapters.values())).shared
        if shared.passing:
            return
        if any(inputs.get(key) is not None for key in ("past_key_values", "cache")):
            raise ConfigError("XLORA weights every token in each call, so it takes no cache; give use_cache=False")
        hidden = shared.first_pass(model, inputs)
        scalings = shared.internal_xlora_classifier(hidden.to(next(shared.parameters()).device))
        shared.record(scalings)
        shared.scalings = shared.chosen(scalings)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        if self.shared.scalings is None:
            return y
        scalings = self._of_tokens(self.shared.scalings, x).to(y)
        number, common = self.shared.numbers[self.path], self.config.global_scaling_weight
        for n, expert in self.shared.at(number).items():
            weight = scalings[..., int(n), None]
            if x.is_floating_point() and common == 1:
                y = expert.after(x * weight.to(x.dtype), y)
            elif x.is_floating_point():
                y = y + common * expert.after(x * weight.to(x.dtype), torch.zeros_like(y))
            else:
                y = y + common * weight * expert.after(x, torch.zeros_like(y))
        return y

    def _of_tokens(self, scalings: Tensor, x: Tensor) -> Tensor:
        """Return this layer's weights (..., n) in the shape of x's tokens, which a model may have flattened."""
        layers = scalings.shape[2]
        own = scalings[:, :, self.shared.numbers[self.path] if layers > 1 else 0].flatten(0, 1)
        tokens = x.shape[:-1] if self.base.kind == "linear" else x.shape
        if len(own) == 1:
            return own[0]
        if len(own) != tokens.numel():
            raise ConfigError(
                f"XLORA: {self.path} sees {tokens.numel()} tokens where the model has {len(own)}; use LoRAs without it"
            )
        return own.view(*tokens, -1)

    def check_mergeable(self) -> None:
        raise MergeError("XLORA's weights depend on the token, so no fixed weight equals the adapter; keep it unmerged")

    @classmethod
    def config_to_save(cls, config: XLoraConfig, adapters: Mapping[str, Adapter]) -> XLoraConfig:
        return replace(config, target_modules=None)
