"""X-LoRA: y = Wx + b + Σ_n s_tln ΔW_n x, trained LoRAs n weighted for each token t and layer l. arXiv:2402.07148.

The weights s come from a classifier over the last hidden states of a first pass, in which every s is
`scaling_pass_value`. So each call computes the model twice, and `generate` works without a cache.
Shapes: b rows, t tokens, l adapted layers, n LoRAs; s (b, t, l, n).
PEFT saves no LoRAs, also where they train; here they are saved under the keys of PEFT's model, which it reads too.
Convolutions, whose positions are no tokens, are not adapted.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from peftcore.adapter import Adapter, Shared
from peftcore.bases import BaseWeight
from peftcore.config import PeftConfig, TunerConfig
from peftcore.errors import CheckpointError, ConfigError, MergeError, TargetError
from peftcore.registry import method_named, register
from peftcore.tensors import PREFIX, read_tensors

NOT_PLAIN = (
    "use_dora",
    "alora_invocation_tokens",
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
    "modules_to_save",
)
"""Options of a LoRA whose effect is no ΔW x at the layer itself, so that it cannot be weighted."""


@dataclass
class XLoraConfig(TunerConfig):
    """X-LoRA's options under PEFT's names. The layers are those of the LoRAs; there is no need to name them."""

    hidden_size: int | None = None
    """Size of the model's hidden states (count); needed."""
    adapters: dict[str, str] | None = field(default_factory=dict)
    """{name: directory of a trained LoRA}; classes are in the order of the names, "2" before "10"."""
    enable_softmax: bool = True
    """Let the weights of a token and layer sum to 1."""
    enable_softmax_topk: bool = False
    """The same among those that `top_k_lora` leaves."""
    softmax_temperature: float = 1.0
    layerwise_scalings: bool = False
    """Weights for each layer; False: one set for all."""
    top_k_lora: int | None = None
    """How many LoRAs act for a token and layer (count); None: all."""
    xlora_depth: int = 1
    """Linear layers of the classifier (count)."""
    xlora_size: int = 2048
    """Hidden size of a classifier of depth 2 or more (count)."""
    xlora_dropout_p: float = 0.2
    """Dropout in a classifier of depth 2 or more."""
    use_trainable_adapters: bool = False
    """Train the LoRAs with the classifier."""
    scaling_pass_value: float = 0.0
    """Every weight in the first pass."""
    global_scaling_weight: float = 1.0
    """Multiplies the output of every LoRA."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size is None:
            raise ConfigError("XLoraConfig: hidden_size is needed; give model.config.hidden_size")
        if not self.adapters:
            raise ConfigError("XLoraConfig: adapters is needed; give {name: directory of a trained LoRA}")
        self.positive("hidden_size", "xlora_depth", "xlora_size")
        self.probability("xlora_dropout_p")
        if self.softmax_temperature <= 0:
            raise ConfigError(f"XLoraConfig: softmax_temperature must be above 0; got {self.softmax_temperature}")
        if self.top_k_lora is not None and not 1 <= self.top_k_lora <= len(self.adapters):
            raise ConfigError(f"XLoraConfig: top_k_lora must be 1 to {len(self.adapters)}; got {self.top_k_lora}")
        if self.enable_softmax and self.enable_softmax_topk:
            warnings.warn(
                "XLoraConfig: a softmax over a softmax flattens the weights; set enable_softmax=False", stacklevel=3
            )

    def directories(self) -> list[Path]:
        """The LoRAs' directories in the order of their classes. (JSON keeps no order of the names.)"""
        adapters = self.adapters or {}
        order = sorted(adapters, key=int) if all(name.isdecimal() for name in adapters) else sorted(adapters)
        return [Path(adapters[name]) for name in order]

    def to_dict(self) -> dict[str, Any]:
        own = super().to_dict()
        unknown_to_peft = TunerConfig().to_dict().keys() - PeftConfig().to_dict().keys()
        return {key: value for key, value in own.items() if value is not None or key not in unknown_to_peft}


class Classifier(nn.Module):
    """Hidden states (b, t, hidden_size) to weights (b, t, l, n)."""

    def __init__(self, config: XLoraConfig, layers: int, experts: int):
        super().__init__()
        assert config.hidden_size is not None
        self.config, self.shape = config, (layers if config.layerwise_scalings else 1, experts)
        sizes = [config.hidden_size, *(config.xlora_size for _ in range(config.xlora_depth - 1))]
        parts: list[nn.Module] = []
        for size, following in pairwise(sizes):
            parts += [nn.Linear(size, following), nn.ReLU()]
            parts += [nn.Dropout(config.xlora_dropout_p)] if config.xlora_dropout_p else []
        self.layers = nn.Sequential(*parts, nn.Linear(sizes[-1], self.shape[0] * experts))

    def forward(self, hidden: Tensor) -> Tensor:
        own = {name: parameter.to(hidden.dtype) for name, parameter in self.layers.named_parameters()}
        logits = torch.func.functional_call(self.layers, own, (hidden,)).unflatten(-1, self.shape)
        return (logits / self.config.softmax_temperature).softmax(-1) if self.config.enable_softmax else logits


class Mixture(Shared):
    """The classifier, the LoRAs of every layer, and the weights of the forward that runs now."""

    def __init__(self, config: XLoraConfig, bases: Mapping[str, BaseWeight]):
        super().__init__()
        self.config, self.numbers = config, {path: number for number, path in enumerate(bases)}
        self.scalings: Tensor | None = None
        """(b, t, l or 1, n) as the layers use them; None: no LoRA acts."""
        self.log: list[Tensor] | None = None
        """A list put here gathers the classifier's weights of every forward."""
        self.passing = False
        experts: list[dict[str, nn.Module]] = [{} for _ in bases]
        for n, directory in enumerate(config.directories()):
            for path, expert in _read_lora(directory, bases).items():
                experts[self.numbers[path]][str(n)] = expert if config.use_trainable_adapters else _frozen(expert)
        self.experts = nn.ModuleList(map(nn.ModuleDict, experts))
        self.internal_xlora_classifier = Classifier(config, len(bases), len(config.directories()))
        self.optional = frozenset(self._trained())

    def _trained(self) -> dict[str, Tensor]:
        if not self.config.use_trainable_adapters:
            return {}
        return {
            ".".join(["lora_model.model", path, kind, n, *rest]): tensor
            for path, number in self.numbers.items()
            for n, expert in self.at(number).items()
            for suffix, tensor in expert.checkpoint_tensors().items()
            for kind, *rest in [suffix.split(".")]
        }

    def at(self, number: int) -> dict[str, Any]:
        """{class: LoRA} of a layer."""
        return dict(cast(nn.ModuleDict, self.experts[number]).items())

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        classifier = self.internal_xlora_classifier.state_dict(prefix="internal_xlora_classifier.")
        return {**classifier, **self._trained()}

    @torch.no_grad()
    def load_checkpoint_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        own = self.checkpoint_tensors()
        for key, tensor in tensors.items():
            own[key].copy_(tensor)

    def first_pass(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """The model's last hidden states while every weight is `scaling_pass_value`."""
        value, shape = self.config.scaling_pass_value, self.internal_xlora_classifier.shape
        self.scalings = self.chosen(torch.full((1, 1, *shape), float(value))) if value else None
        given = {key: argument for key, argument in inputs.items() if key != "labels"}
        self.passing = True
        try:
            with torch.no_grad():
                output = model(**{**given, "output_hidden_states": True, "return_dict": True})
        finally:
            self.passing = False
        states = getattr(output, "hidden_states", None)
        if not states or states[-1].shape[-1] != self.config.hidden_size:
            found = "no hidden_states" if not states else f"hidden states of size {states[-1].shape[-1]}"
            raise ConfigError(f"XLORA: {type(model).__name__} gives {found}; hidden_size={self.config.hidden_size}")
        return states[-1]

    def chosen(self, scalings: Tensor) -> Tensor:
        """The weights after `top_k_lora` and the softmax over what it leaves."""
        if self.config.top_k_lora is not None:
            _, best = scalings.topk(self.config.top_k_lora, dim=-1)
            scalings = scalings * torch.zeros_like(scalings).scatter_(-1, best, 1.0)
        if self.config.enable_softmax_topk:
            left = scalings != 0
            scalings = scalings.masked_fill(~left, float("-inf")).softmax(-1).masked_fill(~left, 0.0)
        return scalings

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "scalings": None}  # a tensor of a graph can be neither copied nor pickled


def _read_lora(directory: Path, bases: Mapping[str, BaseWeight]) -> dict[str, Any]:
    """{path: trained LoRA} of one directory."""
    config = PeftConfig.from_pretrained(directory)
    special = [option for option in NOT_PLAIN if getattr(config, option, None)]
    if config.peft_type != "LORA" or special or getattr(config, "bias", "none") != "none":
        why = ", ".join(special) or (config.peft_type if config.peft_type != "LORA" else "trained biases")
        raise ConfigError(f"XLORA mixes plain LoRAs; {directory} has {why}")
    tensors = read_tensors(directory)
    unused, experts = set(tensors), {}
    for path in _paths(tensors, directory):
        if path not in bases:
            raise TargetError(f"XLORA: {directory} adapts {path}, which target_modules leave out; give none")
        with torch.device(bases[path].device):
            expert = method_named("LORA").adapter(config, bases[path], path)
            expert.reset_parameters()
        own = {suffix: tensors.get(f"{PREFIX}{path}.{suffix}") for suffix in expert.checkpoint_tensors()}
        wrong = [suffix for suffix, tensor in own.items() if tensor is None or not expert.fits(suffix, tensor)]
        if wrong or getattr(expert, "start", None) is not None:
            raise CheckpointError(f"{directory} does not fit: {path}.{(wrong or ['init_lora_weights'])[0]}")
        expert.load_checkpoint_tensors(own)
        unused -= {f"{PREFIX}{path}.{suffix}" for suffix in own}
        experts[path] = expert
    if unused:
        raise CheckpointError(f"{directory} does not fit: unexpected {min(unused)}")
    return experts


def _paths(tensors: Mapping[str, Tensor], directory: Path) -> dict[str, None]:
    """Paths of the layers that a LoRA's tensors adapt, each once."""
    paths = dict.fromkeys(key.removeprefix(PREFIX).split(".lora_")[0] for key in tensors if ".lora_" in key)
    if not paths:
        raise CheckpointError(f"{directory} holds no LoRA; give the directory of a trained one")
    return paths


def _frozen(expert: nn.Module) -> nn.Module:
    """The same with buffers for parameters, so that nothing that makes an adapter trainable reaches them."""
    for name, parameter in list(expert.named_parameters()):
        delattr(expert, name)
        expert.register_buffer(name, parameter.detach())
    return expert


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
        found = {path: d for d in config.directories() for path in _paths(read_tensors(d), d)}
        if absent := sorted(found.keys() - layers.keys()):
            raise TargetError(f"XLORA: {found[absent[0]]} adapts {absent[0]}, which {type(model).__name__} has not")
        return [path for path in layers if path in found]

    @classmethod
    def make_shared(cls, config: XLoraConfig, bases: Mapping[str, BaseWeight]) -> Mixture:
        return Mixture(config, bases)

    def reset_parameters(self) -> None:
        """Nothing is this layer's own."""

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
        if shared.log is not None:
            shared.log.append(scalings.detach())
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
        """This layer's weights (..., n) in the shape of x's tokens, which a model may have flattened."""
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
        raise MergeError("XLORA weights its LoRAs anew for each token, so no weight equals it; keep it unmerged")

    @classmethod
    def config_to_save(cls, config: XLoraConfig, adapters: Mapping[str, Adapter]) -> XLoraConfig:
        return replace(config, target_modules=None)
