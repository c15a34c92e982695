"""MonteCLoRA: in training, A is the mean of random samples around the trained A. arXiv:2411.04358.

Sample k is A plus noise ε_k = c·(z_k diag(σ))ᵀ with normal z_k, and the layer computes with A + Σ w_k ε_k. The
variances σ² are of a Wishart distribution and the weights w of a Dirichlet distribution, with trained parameters. In
evaluation mode, and when merged, the adapter is the plain LoRA of A and B.

The regulariser is the mean over the layers of κ·(divergence from the priors), plus Σw² with `use_entropy`. peftcore's
trainer adds it to the loss; in another training loop, add `model._get_monteclora_loss()`.
Shapes: i in_features, r rank, m samples; A (r, i), z (m, i, r), σ (r,), w (m,).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions.wishart import Wishart

from peftcore.errors import ConfigError
from peftcore.kernels.low_rank import LowRankBranch
from peftcore.methods.lora.options import Options
from peftcore.methods.lora.variant import Variant, register_variant

if TYPE_CHECKING:
    from peftcore.methods.lora.adapter import Lora
    from peftcore.methods.lora.config import LoraConfig

_SAMPLER = "lora_monteclora_sampler"
_SMALL = 1e-6
"""Least value of a concentration or variance of the weights."""
_LEAST_VARIANCE = 1e-3


class MontecloraConfig(Options):
    """Options of MonteCLoRA, for `LoraConfig(monteclora_config=...)`. arXiv:2411.04358.

    Args:
        num_samples: samples m of A per forward pass in training.
        use_entropy: add Σw² to the regulariser.
        dirichlet_prior: concentration of the prior of the weights w.
        sample_scaler: scale c of the noise.
        kl_loss_weight: weight κ of the divergence in the regulariser.
        buffer_size: random numbers are drawn for this many forward passes at a time; they take
            buffer_size·m·i·r numbers of memory in each layer.

    Raises:
        ConfigError: a number is not positive.
    """

    def __init__(
        self,
        num_samples: int = 8,
        use_entropy: bool = False,
        dirichlet_prior: float = 0.1,
        sample_scaler: float = 1e-4,
        kl_loss_weight: float = 1e-5,
        buffer_size: int = 150,
    ):
        for name in ("num_samples", "dirichlet_prior", "buffer_size"):
            if (value := locals()[name]) <= 0:
                raise ConfigError(f"MontecloraConfig: `{name}` must be greater than 0; got {value!r}")
        super().__init__(
            num_samples=num_samples,
            use_entropy=use_entropy,
            dirichlet_prior=dirichlet_prior,
            sample_scaler=sample_scaler,
            kl_loss_weight=kl_loss_weight,
            buffer_size=buffer_size,
        )


class _Sample(NamedTuple):
    """Random numbers of one forward pass."""

    normal: Tensor
    """z (m, i, r)."""
    wishart: Tensor
    """Diagonal (r,) of a sample of the Wishart distribution."""
    dirichlet: Tensor
    """Normal numbers (m,) of the weights."""


class MontecloraSampler(nn.Module):
    """Trained parameters of the noise of one layer, and its random numbers.

    Args:
        inputs: i of the layer.
        r: rank.
        options: the options of MonteCLoRA.
    """

    def __init__(self, inputs: int, r: int, options: Mapping[str, Any]):
        super().__init__()
        samples = options["num_samples"]
        self.inputs, self.options = inputs, dict(options)
        self.std_prior = nn.Parameter(torch.empty(r))
        """Logarithm of the scale of σ."""
        self.expert_weights_prior = nn.Parameter(torch.empty(samples))
        """Logarithm of the concentrations of the weights."""
        self.register_buffer("gaussian_var_prior", torch.eye(r))
        self.register_buffer("expert_weights", torch.full((samples,), 1 / samples))
        self.drawn: list[_Sample] = []
        self.last: _Sample | None = None

    def draw(self, dtype: torch.dtype, device: torch.device) -> None:
        """Draw the random numbers of `buffer_size` forward passes, in the order of HF PEFT."""
        size, samples, r = self.options["buffer_size"], self.options["num_samples"], len(self.std_prior)
        normal = torch.randn(size, samples, self.inputs, r, dtype=dtype, device=device)
        dirichlet = torch.randn(size, samples, dtype=dtype, device=device)
        distribution = Wishart(df=r, scale_tril=torch.eye(r, device=device), validate_args=False)
        wishart = [distribution._bartlett_sampling(torch.Size()).diagonal().to(dtype) for _ in range(size)]
        self.drawn = [_Sample(*one) for one in zip(normal, wishart, dirichlet, strict=True)][::-1]

    def noise(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return Σ w_k ε_k (r, i) of the next sample.

        Args:
            dtype: dtype in which new random numbers are drawn.
            device: device on which new random numbers are drawn.
        """
        if not self.drawn:
            self.draw(dtype, device)
        self.last = sample = _Sample(*(drawn.to(self.std_prior) for drawn in self.drawn.pop()))
        variance, weights = self.variance(sample), self.weights(sample)
        self._buffers.update(gaussian_var_prior=variance.detach().diag(), expert_weights=weights.detach())
        noise = torch.einsum("k,kir->ri", weights, sample.normal)
        return self.options["sample_scaler"] * variance.sqrt()[:, None] * noise

    def variance(self, sample: _Sample) -> Tensor:
        """Return σ² (r,) of a sample."""
        return (torch.exp(2 * self.std_prior) * sample.wishart).clamp_min(_LEAST_VARIANCE)

    def weights(self, sample: _Sample) -> Tensor:
        """Return w (m,) of a sample: the Dirichlet distribution, approximated by a softmax of normal numbers."""
        alpha, count = torch.exp(self.expert_weights_prior).clamp_min(_SMALL), len(self.expert_weights_prior)
        spread = ((1 - 2 / count) / alpha + (1 / alpha).sum() / count**2).clamp_min(_SMALL) + _SMALL
        return torch.softmax(spread.sqrt() * sample.dirichlet + alpha.log() - alpha.log().mean(), dim=-1)

    def loss(self) -> Tensor:
        """Return the regulariser of this layer, for the sample of the last forward pass; 0 in evaluation mode."""
        if not self.training:
            return self.std_prior.new_zeros(())
        r, count = len(self.std_prior), len(self.expert_weights_prior)
        variance = self.get_buffer("gaussian_var_prior").diagonal() if self.last is None else self.variance(self.last)
        divergence = self._of_weights() + 0.5 * r * (torch.exp(2 * self.std_prior) - 2 * self.std_prior - 1).sum()
        divergence = divergence + 0.5 * count * (variance - variance.log()).sum() - 0.5 * count * r
        loss = self.options["kl_loss_weight"] * divergence
        if self.options["use_entropy"]:
            weights = self.get_buffer("expert_weights") if self.last is None else self.weights(self.last)
            loss = loss + weights.square().sum()
        return loss

    def _of_weights(self) -> Tensor:
        """Return the divergence of the weights from their prior, as HF PEFT defines it."""
        alpha = torch.exp(self.expert_weights_prior)
        prior = torch.full_like(alpha, self.options["dirichlet_prior"])
        gammas = alpha.sum().lgamma() - prior.sum().lgamma() + (alpha.lgamma() - prior.lgamma()).sum()
        return gammas + ((alpha - prior) * (alpha.digamma() - alpha.sum().digamma())).sum()


@register_variant
class Monteclora(Variant):
    """Variant for `monteclora_config=MontecloraConfig(...)`: random samples around A in training."""

    option = "monteclora_config"
    options_class = MontecloraConfig
    stands_alone = True
    keys: ClassVar = {
        key: key
        for key in (
            f"{_SAMPLER}.std_prior",
            f"{_SAMPLER}.expert_weights_prior",
            f"{_SAMPLER}.gaussian_var_prior",
            f"{_SAMPLER}.expert_weights",
        )
    }

    def add_parameters(self, lora: "Lora") -> None:
        assert lora.config.monteclora_config is not None
        lora.add_module(_SAMPLER, MontecloraSampler(lora.base.in_features, lora.r, lora.config.monteclora_config))

    def reset_parameters(self, lora: "Lora") -> None:
        sampler, (dtype, device) = _sampler(lora), _drawn_as(lora)
        for prior in (sampler.std_prior, sampler.expert_weights_prior):
            prior.copy_(torch.rand(len(prior), dtype=dtype))
        sampler.draw(dtype, device)

    def low_rank(self, lora: "Lora", branch: LowRankBranch) -> LowRankBranch | None:
        if not lora.training:
            return branch
        if len(lora.variants) > 1:
            return None  # another variant may ask for the general path, which would draw a second sample
        return branch._replace(a=branch.a + _noise(lora).to(branch.a))

    def product(self, lora: "Lora", x: Tensor, a: Tensor) -> Tensor | None:
        return lora.base.apply(x, a + _noise(lora).to(a)) if lora.training else None

    def regularizer(self, config: "LoraConfig", adapters: "Mapping[str, Lora]") -> Tensor:
        return torch.stack([_sampler(lora).loss() for lora in adapters.values()]).mean()

    def checkpoint_tensors(self, lora: "Lora") -> dict[str, Tensor]:
        return {f"{_SAMPLER}.{name}": tensor for name, tensor in _sampler(lora).state_dict().items()}


def _sampler(lora: "Lora") -> MontecloraSampler:
    return lora._modules[_SAMPLER]  # type: ignore[return-value]


def _drawn_as(lora: "Lora") -> tuple[torch.dtype, torch.device]:
    """Return the dtype and the device in which HF PEFT draws random numbers: those of the base's weight."""
    return torch.get_default_dtype() if lora.base.quantized else lora.base.dtype, lora.base.device


def _noise(lora: "Lora") -> Tensor:
    return _sampler(lora).noise(*_drawn_as(lora))
