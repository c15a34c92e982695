"""AdamW with one call of PyTorch's fused kernel per parameter group, for adapters of hundreds of small tensors.

The numbers equal those of `torch.optim.AdamW(fused=True)` bit for bit, because the kernel is the same. Parameters that
have always been updated together share one step counter; PyTorch has one for each parameter. Gradients are not copied
into one flat buffer, which takes longer than it saves (benchmarks/LOG.md).
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

_fused_adamw: Any = torch._fused_adamw_  # pyright: ignore[reportPrivateImportUsage]


class FusedAdamW(torch.optim.AdamW):
    """Faster torch.optim.AdamW(fused=True) with the same state dict, for plain dense tensors.

    A gradient scaler unscales gradients before the step, and skips the step if they overflow.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate.
        betas: Decay rates of the moments.
        eps: Term added to the denominator.
        weight_decay: Decoupled weight decay.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, fused=True)
        self._step_supports_amp_scaling = False  # torch sets True with fused=True

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group |= {"fused": True, "foreach": None}  # the state may come from an optimiser with other options
        counts: dict[tuple[torch.device, float], Tensor] = {}
        for parameter, state_of_parameter in self.state.items():
            if "step" in state_of_parameter:  # a file or torch.optim.AdamW has one counter for each parameter
                step = torch.as_tensor(state_of_parameter["step"], dtype=torch.float32, device=parameter.device)
                state_of_parameter["step"] = counts.setdefault((step.device, step.item()), step.clone())

    def state_dict(self) -> dict[str, Any]:
        """Return the state dict of torch.optim.AdamW, with a step counter for each parameter."""
        state_dict = super().state_dict()
        states = {
            number: {name: value.clone() if name == "step" else value for name, value in state.items()}
            for number, state in state_dict["state"].items()
        }
        return state_dict | {"state": states}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update the parameters that have a gradient, and return the loss of `closure`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._start_moments()
        self._advance_counts()
        for group in self.param_groups:
            for parameters in self._by_device_and_dtype(group["params"]):
                states = [self.state[parameter] for parameter in parameters]
                _fused_adamw(
                    parameters,
                    [parameter.grad for parameter in parameters],
                    [state["exp_avg"] for state in states],
                    [state["exp_avg_sq"] for state in states],
                    [],
                    [state["step"] for state in states],
                    lr=group["lr"],
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    amsgrad=False,
                    maximize=False,
                )
                increment_version(parameters)  # the kernel does not tell autograd that it writes
        return loss

    def _parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for group in self.param_groups for parameter in group["params"])

    def _start_moments(self) -> None:
        zeros: dict[torch.device, Tensor] = {}
        for parameter in self._parameters():
            if parameter.grad is None or self.state.get(parameter):
                continue
            device = parameter.device
            step = zeros.setdefault(device, torch.zeros((), dtype=torch.float32, device=device))
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            self.state[parameter] = {"step": step, **moments}

    def _advance_counts(self) -> None:
        stepping: dict[int, list[dict[str, Any]]] = defaultdict(list)
        waiting: set[int] = set()
        for parameter in self._parameters():
            state = self.state.get(parameter, {})
            if parameter.grad is not None:
                stepping[id(state["step"])].append(state)
            elif state:
                waiting.add(id(state["step"]))
        for count, states in stepping.items():
            if count not in waiting:
                states[0]["step"] += 1
                continue
            advanced = states[0]["step"] + 1  # parameters without gradient keep the old counter
            for state in states:
                state["step"] = advanced

    @staticmethod
    def _by_device_and_dtype(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
        """Return groups of the parameters that have a gradient."""
        groups: dict[tuple[torch.device, torch.dtype], list[nn.Parameter]] = defaultdict(list)
        for parameter in parameters:
            if parameter.grad is not None:
                groups[parameter.device, parameter.dtype].append(parameter)
        return list(groups.values())
