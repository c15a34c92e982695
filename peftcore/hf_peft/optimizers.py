"""`peft.optimizers`: optimisers that treat LoRA's two factors differently."""

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peftcore.errors import ConfigError
from peftcore.hf_peft.alias import is_submodule, submodule
from peftcore.hf_peft.reexports import reexported
from peftcore.injection.adapter_set import adapter_set

if TYPE_CHECKING:
    from peftcore.train.optimizers import LoraFa

__all__ = ["create_lorafa_optimizer", "create_loraplus_optimizer", "create_riemannian_optimizer"]
__path__: list[str] = []  # makes this module a package, because HF PEFT has submodules here; see `alias`


def create_loraplus_optimizer(
    model: nn.Module, optimizer_cls: type[torch.optim.Optimizer], *, lr: float, loraplus_lr_ratio: float, **kwargs: Any
) -> torch.optim.Optimizer:
    """Create a LoRA+ optimiser, arXiv:2402.12354; see `peftcore.train.optimizers.create_loraplus_optimizer`.

    Args:
        model: a PeftModel with an active LoRA.
        optimizer_cls: class of the optimiser.
        lr: learning rate of A.
        loraplus_lr_ratio: ratio of B's learning rate to A's.
        kwargs: `loraplus_lr_embedding`, `loraplus_weight_decay`, and further arguments of `optimizer_cls`.

    Raises:
        ConfigError: no active adapter is a LoRA.
        MissingExtraError: the extra `train` is not installed.
    """
    from peftcore.train.optimizers import create_loraplus_optimizer as create

    return create(model, optimizer_cls, lr, loraplus_lr_ratio, **kwargs)


def create_lorafa_optimizer(
    model: nn.Module, r: int, lora_alpha: int, lr: float, weight_decay: float = 0.0, use_rslora: bool | None = None
) -> "LoraFa":
    """Freeze A of every active LoRA, and create the LoRA-FA optimiser, arXiv:2308.03303.

    As in HF PEFT, each layer's own scaling is used.

    Args:
        model: a PeftModel with an active LoRA.
        r: rank of the active adapters; another value has no effect, and is a warning.
        lora_alpha: α of the active adapters; another value has no effect, and is a warning.
        lr: learning rate.
        weight_decay: decoupled weight decay.
        use_rslora: None, or the value of the active adapters' configuration.

    Raises:
        ConfigError: an active adapter has another use_rslora; or none is a LoRA.
        MissingExtraError: the extra `train` is not installed.
    """
    from peftcore.train.optimizers import create_lorafa_optimizer as create

    adapters = adapter_set(model)
    for name in adapters.selection.active:
        config: Any = adapters.configs[name]
        for option, value in {"r": r, "lora_alpha": lora_alpha, "use_rslora": use_rslora}.items():
            if value is None or getattr(config, option, value) == value:
                continue
            message = f"create_lorafa_optimizer: {option}={value!r}, but adapter {name!r} has "
            message += f"{option}={getattr(config, option)!r}"
            if option == "use_rslora":
                raise ConfigError(f"{message}; leave the argument out")
            warnings.warn(f"{message}; the scaling of each layer is used", stacklevel=2)
    return create(model, lr, weight_decay)


def create_riemannian_optimizer(
    model: nn.Module, optimizer_cls: type[torch.optim.Optimizer], *, lr: float, reg: float = 1e-2, **kwargs: Any
) -> torch.optim.Optimizer:
    """Create an optimiser that scales the gradients of LoRA's factors first, arXiv:2402.02347.

    See `peftcore.train.optimizers.create_riemannian_optimizer`.

    Args:
        model: a PeftModel with an active LoRA.
        optimizer_cls: class of the optimiser.
        lr: learning rate.
        reg: damping of the scaling.
        kwargs: further arguments of `optimizer_cls`.

    Raises:
        TypeError: `optimizer_cls` is no class of optimisers.
        ConfigError: no active adapter is a LoRA on a linear layer, or the optimiser requires a closure.
        MissingExtraError: the extra `train` is not installed.
    """
    from peftcore.train.optimizers import create_riemannian_optimizer as create

    return create(model, optimizer_cls, lr, reg, **kwargs)


def __getattr__(name: str) -> Any:
    if name == "LoraFAOptimizer":  # for isinstance; create_lorafa_optimizer makes one
        from peftcore.train.optimizers import LoraFa

        return LoraFa
    return submodule(__name__, name) if is_submodule(__name__, name) else reexported(__name__, name)
