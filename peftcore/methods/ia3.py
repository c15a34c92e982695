"""IA3: y = l ⊙ (Wx + b), and y = W(l ⊙ x) + b at feed-forward layers. arXiv:2205.05638.

Shapes: i in_features, o out_features; l is (o, 1), or (1, i) at a feed-forward layer; (1, o or i, *1) for convolutions.
Unlike PEFT, `feedforward_modules` match whole path segments, and a vector with zeros unmerges exactly.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from peftcore._util.patterns import matched
from peftcore.adapter import Adapter, ScaleName
from peftcore.bases import BaseWeight
from peftcore.config import TunerConfig
from peftcore.detection import detect
from peftcore.detection.defaults import GIVEN_FEEDFORWARD
from peftcore.detection.model_kind import model_type_of
from peftcore.errors import ConfigError, TargetError
from peftcore.kernels.maths import scaled
from peftcore.kernels.start_values import normal_
from peftcore.registry import register


@dataclass
class IA3Config(TunerConfig):
    """IA3's options under PEFT's names."""

    not_saved_if_none: ClassVar[tuple[str, ...]] = ("layers_pattern", "layers_to_transform")

    feedforward_modules: list[str] | set[str] | str | None = None
    """Targets whose input is scaled, not the output, named as in target_modules; None: the architecture's default."""
    init_ia3_weights: bool = True
    """True: l starts at one, so the adapter changes nothing; False: random, for tests."""
    fan_in_fan_out: bool = False
    """Read and saved for PEFT; without effect, because the orientation is found per layer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.feedforward_modules, str | None):
            return
        self.feedforward_modules = set(self.feedforward_modules)
        if isinstance(self.target_modules, set):
            for name in sorted(self.feedforward_modules - self.among_targets(self.feedforward_modules)):
                raise ConfigError(
                    f"IA3Config: feedforward_modules {name!r} is not among target_modules "
                    f"{sorted(self.target_modules)}; add it there too"
                )

    def among_targets(self, names: Iterable[str]) -> set[str]:
        """Return the names that are targets; all of them if `target_modules` is a regular expression."""
        if not isinstance(self.target_modules, set):
            return set(names)
        targets = self.target_modules
        return {name for name in names if any(_ends_with(name, one) or _ends_with(one, name) for one in targets)}

    def is_feedforward(self, path: str) -> bool:
        """Return True if the input, not the output, is scaled at the layer at `path`."""
        if isinstance(self.feedforward_modules, str):
            return matched(self.feedforward_modules, path) is not None
        return any(_ends_with(path, name) for name in self.feedforward_modules or ())


def _ends_with(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


@register("IA3", IA3Config)
class IA3(Adapter):
    """IA3 at one layer."""

    layer_kinds = frozenset({"linear", "conv", "embedding"})

    def __init__(self, config: IA3Config, base: BaseWeight, path: str):
        super().__init__(config, base, path)
        self.scales_input = config.is_feedforward(path)
        if self.scales_input and base.kind == "embedding":
            raise ConfigError(f"IA3: the input of {path} is token ids; remove it from feedforward_modules")
        self.starts_at_one = config.init_ia3_weights
        features = base.in_features if self.scales_input else base.out_features
        shape = (1, features) if self.scales_input or base.kind == "conv" else (features, 1)
        self.ia3_l = nn.Parameter(torch.empty(*shape, *(1 for _ in base.kernel)))

    def extra_repr(self) -> str:
        return f"scales_input={self.scales_input}"

    @torch.no_grad()
    def reset_parameters(self) -> None:
        normal_(self.ia3_l)
        if self.starts_at_one:
            nn.init.ones_(self.ia3_l)

    def _scaled(self, features: Tensor) -> Tensor:
        return scaled(features, self.base.per_output(self.ia3_l.view(-1)))

    def before(self, x: Tensor) -> Tensor:
        return self._scaled(x) if self.scales_input else x

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return y if self.scales_input else self._scaled(y)

    def scale_name(self) -> ScaleName | None:
        return ScaleName("ia3_l", self.scales_input) if self.base.kind == "linear" else None

    def merged_weight(self, weight: Tensor) -> Tensor:
        scale = self.ia3_l.flatten().to(weight)
        if not self.scales_input:
            return (weight.flatten(1) * scale[:, None]).view(weight.shape)
        groups = len(scale) // weight.shape[1]  # of a convolution: each filter sees the inputs of its own group
        per_filter = scale.view(groups, -1).repeat_interleave(len(weight) // groups, 0)
        return weight * per_filter.view(*per_filter.shape, *(1 for _ in self.base.kernel))

    def merged_bias(self, bias: Tensor | None) -> Tensor | None:
        return bias if bias is None or self.scales_input else bias * self.ia3_l.flatten()

    @classmethod
    def completed(cls, config: IA3Config, model: nn.Module, targets: Sequence[str]) -> IA3Config:
        if config.feedforward_modules is not None:
            return config
        given = GIVEN_FEEDFORWARD.get(model_type_of(model))
        if given is not None:
            return dataclasses.replace(config, feedforward_modules=config.among_targets(given))
        try:
            found = detect(model)
        except TargetError:  # embeddings and heads alone have no MLP
            return dataclasses.replace(config, feedforward_modules=set())
        chosen = {path for path in targets if re.fullmatch(found.target_regex(found.feedforward_modules), path)}
        names = config.target_modules if isinstance(config.target_modules, set) else set()
        reach = {name: {path for path in targets if _ends_with(path, name)} for name in names}
        whole = {name for name, paths in reach.items() if paths and paths <= chosen}
        rest = chosen.difference(*(reach[name] for name in whole))
        return dataclasses.replace(config, feedforward_modules=whole | rest)

    @classmethod
    def config_to_save(cls, config: IA3Config, adapters: Mapping[str, Adapter]) -> IA3Config:
        """Return the configuration with all paths named, because PEFT's IA3 has no `layers_to_transform`."""
        feedforward = config.feedforward_modules or set()
        if config.layers_to_transform is not None:
            chosen = {path for path in adapters if config.is_feedforward(path)}
            return dataclasses.replace(
                config,
                target_modules=set(adapters),
                feedforward_modules=chosen,
                layers_to_transform=None,
                layers_pattern=None,
            )
        targets = config.target_modules
        if isinstance(targets, set) and not isinstance(feedforward, str):
            targets = targets | set(feedforward)
        return dataclasses.replace(config, target_modules=targets, feedforward_modules=feedforward)
