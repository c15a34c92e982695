"""`RankAllocator`: HF PEFT's object that chooses AdaLoRA's triplets, as a view on the adapters.

The scores and the masks belong to the layers' adapters, so an allocator has no state of its own. Names of tensors are
HF PEFT's, such as "layers.0.q_proj.lora_E.default". See `peftcore.methods.adalora` for the symbols.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftcore._util.unneeded_replacements import is_unneeded
from peftcore.errors import ConfigError, OptionTypeError, PeftError
from peftcore.injection.adapter_set import adapter_set
from peftcore.methods.adalora import AdaLora, AdaLoraConfig

Mask = Sequence[bool] | Tensor
_TENSORS = ("lora_A", "lora_B", "lora_E")


class _Fixed(type):
    """Metaclass of a class whose methods cannot be replaced, because AdaLoRA's training would not call them."""

    def __setattr__(cls, name: str, value: Any) -> None:
        if is_unneeded(value):
            return
        raise PeftError(
            f"{cls.__name__}.{name} cannot be replaced, because peftcore's AdaLoRA does not call it; for another "
            "allocation, register a subclass of peftcore.methods.adalora.AdaLora with an on_step of its own"
        )


class RankAllocator(metaclass=_Fixed):
    """The allocation of AdaLoRA's budget in one adapter, for training loops that call its parts.

    Args:
        model: the model with the adapter.
        peft_config: the adapter's configuration.
        adapter_name: the adapter.

    Raises:
        ConfigError: the adapter is no AdaLoRA.
        AdapterNameError: the adapter is not loaded.
    """

    def __init__(self, model: nn.Module, peft_config: AdaLoraConfig, adapter_name: str):
        self._layers = layers_of(model, adapter_name)
        self.peft_config, self.adapter_name = peft_config, adapter_name
        self.beta1, self.beta2 = peft_config.beta1, peft_config.beta2
        self.name_set = sorted(f"{path}.%s.{adapter_name}" for path in self._layers)
        """Names of the layers' tensors, with %s in place of "lora_A", "lora_B" or "lora_E"."""
        self.init_bgt = sum(len(adapter.kept) for adapter in self._layers.values())
        """Triplets at the start (count)."""
        self.target_bgt = peft_config.target_r * len(self._layers)
        """Triplets at the end (count)."""

    @property
    def exp_avg_ipt(self) -> dict[str, Tensor]:
        """{name: running mean Ī of the importance, in the tensor's shape}, from the first update on."""
        return self._importance(0)

    @property
    def exp_avg_unc(self) -> dict[str, Tensor]:
        """{name: running mean Ū of the importance's deviation}, from the first update on."""
        return self._importance(1)

    def _importance(self, number: int) -> dict[str, Tensor]:
        return {
            f"{path}.{key}.{self.adapter_name}": adapter.importance[key][number]
            for path, adapter in self._layers.items()
            for key in _TENSORS
            if key in adapter.importance
        }

    def set_total_step(self, total_step: int) -> None:
        """Set the number of optimiser steps of the whole training, in the configuration."""
        self.peft_config.total_step = total_step

    def reset_ipt(self) -> None:
        """Forget the importance of all triplets."""
        for adapter in self._layers.values():
            adapter.importance = {}

    def budget_schedule(self, step: int) -> tuple[int, bool]:
        """Return the number of triplets to keep at a step (from 1), and True if the masks are renewed there."""
        config = self.peft_config
        if step <= config.tinit:
            return self.init_bgt, False
        renews = step > config.final_step or step % config.deltaT == 0
        return config.budget(step, len(self._layers)), renews

    def update_ipt(self, model: nn.Module) -> None:
        """Update the importance of all triplets from the gradients.

        Args:
            model: the model with the adapter.
        """
        for adapter in self._of(model).values():
            adapter._update_importance(self.peft_config)

    def mask_to_budget(self, model: nn.Module, budget: int) -> dict[str, list[bool]]:
        """Keep the triplets with the highest scores, and set λ of the others to zero.

        HF PEFT drops all triplets that have the threshold's score, here exactly `budget` stay.

        Args:
            model: the model with the adapter.
            budget: the number of triplets to keep in the whole model.

        Returns:
            {name of lora_E: mask of the triplets}.
        """
        layers = self._of(model)
        scores = torch.cat([adapter.scores().cpu() for adapter in layers.values()])
        kept = torch.zeros(len(scores), dtype=torch.bool)
        kept[torch.argsort(scores, descending=True, stable=True)[:budget]] = True
        masks = dict(zip(layers, kept.split([len(adapter.lora_E_weight) for adapter in layers.values()]), strict=True))
        for path, adapter in layers.items():
            _mask(adapter, masks[path])
        return {f"{path}.lora_E.{self.adapter_name}": mask.tolist() for path, mask in masks.items()}

    def update_and_allocate(
        self, model: nn.Module, global_step: int, force_mask: bool = False
    ) -> tuple[int, dict[str, list[bool]] | None]:
        """Update the importance before the last phase, and renew the masks if the schedule says so.

        Args:
            model: the model with the adapter.
            global_step: number of the step.
            force_mask: True renews the masks at any step.

        Returns:
            The number of triplets to keep, and {name of lora_E: mask}; None without new masks.
        """
        if global_step < self.peft_config.final_step:
            self.update_ipt(model)
        budget, renews = self.budget_schedule(global_step)
        return budget, self.mask_to_budget(model, budget) if renews or force_mask else None

    def mask_using_rank_pattern(self, model: nn.Module, rank_pattern: Mapping[str, Mask]) -> None:
        """Set λ of the triplets to zero that masks leave out.

        Args:
            model: the model with the adapter.
            rank_pattern: {name of lora_E, with or without the adapter's name: mask}.
        """
        for path, mask in masks_of(self._of(model), rank_pattern, self.adapter_name).items():
            _mask(self._layers[path], mask)

    def _of(self, model: nn.Module) -> dict[str, AdaLora]:
        if (layers := layers_of(model, self.adapter_name)) != self._layers:
            raise PeftError("RankAllocator: the layers have other adapters now; make a new allocator")
        return layers


def layers_of(model: nn.Module, adapter_name: str) -> dict[str, AdaLora]:
    """Return {path: adapter} of an AdaLoRA.

    Raises:
        ConfigError: the adapter is no AdaLoRA.
        AdapterNameError: the adapter is not loaded.
    """
    adapters = adapter_set(model)
    adapters.require(adapter_name)
    if not isinstance(adapters.configs[adapter_name], AdaLoraConfig):
        raise ConfigError(f"{adapter_name!r} is no AdaLoRA, but {adapters.configs[adapter_name].method}")
    return cast(dict[str, AdaLora], adapters.of_method(adapter_name))


def masks_of(layers: Mapping[str, AdaLora], rank_pattern: Mapping[str, Mask], adapter_name: str) -> dict[str, Tensor]:
    """Return {path: mask (r,)} of masks by HF PEFT's names, such as "0.lora_E.default" or "0.lora_E".

    Raises:
        ConfigError: a name is not that of an adapted layer, or a mask has another length than the layer's rank.
        OptionTypeError: a mask is no list and no tensor.
    """
    masks = {}
    for name, mask in rank_pattern.items():
        path = name.removesuffix(f".{adapter_name}").removesuffix(".lora_E")
        if path not in layers:
            raise ConfigError(f"rank_pattern: {name} is no layer of {adapter_name!r}; it adapts {', '.join(layers)}")
        if not isinstance(mask, list | Tensor):
            raise OptionTypeError(f"rank_pattern at {name} must be a list or a tensor; got {type(mask).__name__}")
        masks[path] = torch.as_tensor(mask, device="cpu").flatten().bool()
        if len(masks[path]) != (r := len(layers[path].lora_E_weight)):
            raise ConfigError(f"rank_pattern at {name} must have {r} entries, the rank; got {len(masks[path])}")
    return masks


@torch.no_grad()
def resize(adapter: AdaLora, mask: Tensor) -> None:
    """Shrink an adapter to some of its triplets.

    Args:
        adapter: the adapter; its parameters are new ones afterwards.
        mask: the triplets to keep (r,), for the r that the parameters hold now.
    """
    if len(mask) == len(adapter.kept):
        adapter.kept = mask
    else:  # the parameters hold the kept triplets alone
        adapter.kept = adapter.kept.masked_scatter(adapter.kept, mask)
    rows = mask.nonzero().flatten()
    for key in _TENSORS:
        old: nn.Parameter = getattr(adapter, f"{key}_weight")
        new = old.index_select(1 if key == "lora_B" else 0, rows.to(old.device))
        setattr(adapter, f"{key}_weight", nn.Parameter(new, old.requires_grad))
    adapter.importance = {}


@torch.no_grad()
def _mask(adapter: AdaLora, mask: Tensor) -> None:
    """Set λ of triplets to zero."""
    if len(mask) == len(adapter.kept):  # else the dropped triplets are gone already
        adapter.kept = mask
    adapter.lora_E_weight[~mask.to(adapter.lora_E_weight.device)] = 0
