"""AdamW in one call of PyTorch's fused kernel for all parameters of a group: adapters are hundreds of small tensors.

The same numbers as `torch.optim.AdamW(fused=True)`, bit for bit: the kernel is the same, and parameters that have
always stepped together share one count of their steps, where PyTorch counts each one's. Parameters, gradients and
moments stay where they are: copying the gradients into one flat buffer takes longer than it saves (benchmarks/LOG.md).
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

_fused_adamw: Any = torch._fused_adamw_  # pyright: ignore[reportPrivateImportUsage]


class FusedAdamW(torch.optim.AdamW):
    """torch.optim.AdamW(fused=True), whose state it reads and writes; for plain dense tensors.

    A gradient scaler unscales before the step and leaves it out when gradients overflow, so that whoever asks whether a
    step was taken is told.
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
        self._step_supports_amp_scaling = False  # what torch sets with fused=True

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group |= {"fused": True, "foreach": None}  # whatever wrote the state
        counts: dict[tuple[torch.device, float], Tensor] = {}
        for parameter, held in self.state.items():
            if "step" in held:  # each parameter's own, when it was loaded from a file or from torch.optim.AdamW
                step = torch.as_tensor(held["step"], dtype=torch.float32, device=parameter.device)
                held["step"] = counts.setdefault((step.device, step.item()), step.clone())

    def state_dict(self) -> dict[str, Any]:
        """As of torch.optim.AdamW, which counts each parameter's steps by itself."""
        found = super().state_dict()
        states = {
            number: {name: value.clone() if name == "step" else value for name, value in state.items()}
            for number, state in found["state"].items()
        }
        return found | {"state": states}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; parameters without gradient are left alone, as by PyTorch."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._start_moments()
        self._advance_counts()
        for group in self.param_groups:
            for parameters in self._alike(group["params"]):
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
                increment_version(parameters)  # the kernel tells autograd nothing of what it has written
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
            own = states[0]["step"] + 1  # those without gradient keep the old count
            for state in states:
                state["step"] = own

    @staticmethod
    def _alike(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
        """Those with a gradient, by device and dtype."""
        found: dict[tuple[torch.device, torch.dtype], list[nn.Parameter]] = defaultdict(list)
        for parameter in parameters:
            if parameter.grad is not None:
                found[parameter.device, parameter.dtype].append(parameter)
        return list(found.values())
