"""Shared state of an X-LoRA's layers: the classifier, the LoRAs, and the weights of the current forward pass."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftcore._util.per_thread import PerThread
from peftcore.adapter import Shared
from peftcore.bases import BaseWeight
from peftcore.bases.current_parameters import call_with_parameters
from peftcore.errors import ConfigError
from peftcore.methods.xlora.config import XLoraConfig
from peftcore.methods.xlora.experts import frozen, read_lora


class Classifier(nn.Module):
    """Classifier from hidden states (b, t, hidden_size) to weights (b, t, l, n)."""

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
        logits = call_with_parameters(self.layers, own, (hidden,)).unflatten(-1, self.shape)
        return (logits / self.config.softmax_temperature).softmax(-1) if self.config.enable_softmax else logits


class Mixture(Shared):
    """The classifier, the LoRAs of every layer, and the weights of the current forward pass."""

    scalings = PerThread()
    """(b, t, l or 1, n) as the layers use them; None: no LoRA acts."""
    passing = PerThread(False)
    """True while the first pass runs."""

    def __init__(self, config: XLoraConfig, bases: Mapping[str, BaseWeight]):
        super().__init__()
        self.config, self.numbers = config, {path: number for number, path in enumerate(bases)}
        self.latest: Tensor | None = None
        """The classifier's weights (b, t, l, n) of the latest forward pass, without gradients."""
        self.logs = False
        """True: every forward pass appends these weights to `log`."""
        self.log: list[Tensor] = []
        experts: list[dict[str, nn.Module]] = [{} for _ in bases]
        for n, directory in enumerate(config.directories()):
            for path, expert in read_lora(directory, bases).items():
                experts[self.numbers[path]][str(n)] = expert if config.use_trainable_adapters else frozen(expert)
        self.experts = nn.ModuleList(map(nn.ModuleDict, experts))
        self.internal_xlora_classifier = Classifier(config, len(bases), len(config.adapters or {}))
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
        """Return the model's last hidden states with every weight at `scaling_pass_value`."""
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
            raise ConfigError(
                f"XLORA: hidden_size={self.config.hidden_size}, and {type(model).__name__} returns {found}; give the "
                "model's own config.hidden_size"
            )
        return states[-1]

    def record(self, scalings: Tensor) -> None:
        """Keep the classifier's weights (b, t, l or 1, n) for those who want to see them."""
        self.latest = scalings.detach().expand(-1, -1, len(self.numbers), -1)
        if self.logs:
            self.log.append(self.latest)

    def chosen(self, scalings: Tensor) -> Tensor:
        """Return the weights after `top_k_lora` and the softmax over the selected ones."""
        if self.config.top_k_lora is not None:
            _, best = scalings.topk(self.config.top_k_lora, dim=-1)
            scalings = scalings * torch.zeros_like(scalings).scatter_(-1, best, 1.0)
        if self.config.enable_softmax_topk:
            left = scalings != 0
            scalings = scalings.masked_fill(~left, float("-inf")).softmax(-1).masked_fill(~left, 0.0)
        return scalings

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "scalings": None}  # a tensor of a graph can be neither copied nor pickled
