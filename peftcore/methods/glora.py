"""GLoRA: W' = W + W₀ ⊙ A + B and b' = b + b₀ ⊙ D + E + W₀ C, with W₀ and b₀ the base's own. arXiv:2306.07967.

Each of the five is a product of two factors ("lora"), one number for each output ("vector"; for C, for each input), one
number ("constant"), or absent ("none"). A layer without a bias has A and B only.

Shapes: i in_features, o out_features, r rank. "lora": A and B are Xd (o, r) times Xu (r, i), C is Xd (i, r) times
Xu (r, 1). "vector": A and B (o, 1), C (i, 1), D and E (o,). "constant": (1,).
PEFT saves zeros for what is absent. Vectors of zeros are saved here too; matrices of zeros (A and B) are only read.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from peftcore.adapter import Adapter
from peftcore.bases import BaseWeight
from peftcore.config import TunerConfig
from peftcore.kernels.start_values import kaiming_uniform_, normal_
from peftcore.registry import register


@dataclass
class GloraConfig(TunerConfig):
    """GLoRA's options under PEFT's names."""

    not_saved_if_none: ClassVar[tuple[str, ...]] = ("exclude_modules", "layers_pattern", "layers_to_transform")

    r: int = 8
    """Rank of what is "lora" (count)."""
    config_A_B: str = "lora"
    """Form of A and B: "lora", "vector", "constant" or "none"."""
    config_C: str = "lora"
    """Form of C: "lora", "vector" or "none"."""
    config_D_E: str = "constant"
    """Form of D and E: "vector", "constant" or "none"."""
    bias: str = "none"
    """Biases of the model that train too: "none", "all" or "glora_only"."""
    init_weights: bool = True
    """True: the adapter starts at zero; False: random, for tests."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("r")
        self.one_of("config_A_B", self.config_A_B, ("lora", "vector", "constant", "none"))
        self.one_of("config_C", self.config_C, ("lora", "vector", "none"))
        self.one_of("config_D_E", self.config_D_E, ("vector", "constant", "none"))
        self.one_of("bias", self.bias, ("none", "all", "glora_only"))


class Term(nn.Module):
    """One of A to E, which adds no parameter if it is absent.

    Args:
        form: "lora", "vector", "constant" or "none".
        shape: rows and columns of the term, (o,) of D and E.
        r: rank of the factors.
    """

    def __init__(self, form: str, shape: tuple[int, ...], r: int):
        super().__init__()
        self.form, self.absent, self.shape = form, form == "none", shape
        if form == "lora":
            self.Xd, self.Xu = nn.Parameter(torch.empty(shape[0], r)), nn.Parameter(torch.empty(r, shape[1]))
        elif form != "none":
            self.X = nn.Parameter(torch.empty({"vector": (shape[0], *(1 for _ in shape[1:]))}.get(form, (1,))))

    def reset_parameters(self, at_zero: bool) -> None:
        """Draw the start values, in PEFT's order."""
        if self.form == "lora":
            kaiming_uniform_(self.Xu)
        if self.absent:
            return
        last = self.Xd if self.form == "lora" else self.X
        if at_zero:
            nn.init.zeros_(last)
        elif self.form == "constant":
            normal_(last, std=0.02)
        else:
            kaiming_uniform_(last if last.dim() == 2 else last[None])

    def forward(self) -> Tensor:
        """Return the term, or a tensor that broadcasts to it."""
        return self.Xd @ self.Xu if self.form == "lora" else self.X


@register("GLORA", GloraConfig)
class Glora(Adapter):
    """GLoRA at one layer."""

    def __init__(self, config: GloraConfig, base: BaseWeight, path: str):
        super().__init__(config, base, path)
        i, o, r, has_bias = base.in_features, base.out_features, config.r, base.bias is not None
        self.starts_at_zero = config.init_weights
        self.glora_A, self.glora_B = (Term(config.config_A_B, (o, i), r) for _ in "AB")
        self.glora_C = Term(config.config_C if has_bias else "none", (i, 1), r)
        self.glora_D, self.glora_E = (Term(config.config_D_E if has_bias else "none", (o,), r) for _ in "DE")

    def _terms(self) -> dict[str, Term]:
        return {name: term for name, term in self.named_children() if isinstance(term, Term)}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for term in self._terms().values():
            term.reset_parameters(self.starts_at_zero)

    def _own_weight(self) -> Tensor:
        """Return W₀ (o, i), in the type of the parameters."""
        own = self.base.read_unmerged()
        return own.to(next(self.parameters(), own).dtype)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        own = self.base.read_unmerged().to(x.dtype)
        if not self.glora_A.absent:
            y = y + self.base.apply(x, self._weight_change(own)).to(y.dtype)
        shift = self._bias_shift(own)
        return y if shift is None else y + shift.to(y.dtype)

    def _weight_change(self, own: Tensor) -> Tensor:
        """Return W₀ ⊙ A + B (o, i) in the type of W₀."""
        return torch.zeros_like(own) if self.glora_A.absent else own * self.glora_A().to(own) + self.glora_B().to(own)

    def _bias_shift(self, own: Tensor) -> Tensor | None:
        """Return b₀ ⊙ D + E + W₀ C (o,) in the type of W₀; None if all three are absent."""
        shifts = []
        if not self.glora_D.absent:
            bias = self.base.unmerged_bias if self.trained_bias is None else self.trained_bias.bias
            assert bias is not None
            shifts.append(bias.to(own) * self.glora_D().to(own) + self.glora_E().to(own))
        if not self.glora_C.absent:
            shifts.append((own @ self.glora_C().to(own))[:, 0])
        return sum(shifts) if shifts else None  # type: ignore[return-value]

    def delta_weight(self) -> Tensor:
        return self._weight_change(self._own_weight())

    def merged_bias(self, bias: Tensor | None) -> Tensor | None:
        shift = self._bias_shift(self._own_weight())
        return bias if bias is None or shift is None else bias + shift.to(bias)

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        absent = {name: self._terms()[name] for name in ("glora_C", "glora_D", "glora_E") if self._terms()[name].absent}
        zeros = {f"{name}.zeros": torch.zeros(term.shape, device=self.base.device) for name, term in absent.items()}
        return super().checkpoint_tensors() | zeros

    def repeated_keys(self) -> set[str]:
        return {f"{name}.zeros" for name, term in self._terms().items() if term.absent}
