"""LoRA's options under PEFT's names. The options of variants are checked by the variants."""

import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, make_dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeGuard, cast

import torch

from peftcore.config import PeftConfig, TunerConfig, first_match
from peftcore.errors import ConfigError
from peftcore.methods.lora.initialisation import Initialisation
from peftcore.methods.lora.variant import Variant, variants
from peftcore.registry import method_named

if TYPE_CHECKING:
    from peftcore.methods.lora.adapter import Lora
    from peftcore.methods.lora.observer import Observer

_WITHOUT_EFFECT_ON_TENSORS = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "init_lora_weights",
    "peft_version",
    "revision",
    "task_type",
}
_CHOSEN = "_chosen_variants"
"""Attribute with the cached result of `LoraConfig.variants`."""


@dataclass
class LoraRuntimeConfig:
    """Options that are not saved."""

    ephemeral_gpu_offload: bool = False
    """Compute DoRA's first row lengths on a CUDA device, one layer at a time, for layers that are on the CPU."""

    def __post_init__(self) -> None:
        if not isinstance(self.ephemeral_gpu_offload, bool):
            raise ConfigError(
                f"LoraRuntimeConfig: ephemeral_gpu_offload must be True or False; got {self.ephemeral_gpu_offload!r}"
            )
        if self.ephemeral_gpu_offload and not torch.cuda.is_available():
            warnings.warn(
                "LoraRuntimeConfig: ephemeral_gpu_offload=True needs a CUDA device, and PyTorch finds none; everything "
                "is computed on the CPU",
                stacklevel=3,
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the options as a plain dictionary."""
        return dict(vars(self))


@dataclass
class LoraConfig(TunerConfig):
    """LoRA's options under PEFT's names."""

    ignored_on_disk: ClassVar[dict[str, Any]] = {
        "megatron_config": None,
        "megatron_core": "megatron.core",
    }

    not_saved: ClassVar[tuple[str, ...]] = ("runtime_config",)

    r: int = 8
    """Rank (count)."""
    lora_alpha: float = 8
    """α of the scaling s = α/r."""
    lora_dropout: float = 0.0
    """Probability of dropping an element of the adapter's input in training."""
    use_rslora: bool = False
    """Scale by α/√r instead of α/r."""
    use_dora: bool = False
    """Train the length of each row of W' separately from its direction (DoRA)."""
    bias: str = "none"
    """Biases of the model that train too: "none", "all" or "lora_only"."""
    lora_bias: bool = False
    """Give B a bias of its own."""
    init_lora_weights: bool | str = True
    """Initialisation of A and B. True: B is zero; False: random, for tests; or a name, see `lora/variants`.

    "pissa", "pissa_niter_N", "olora" and "loftq" need only the base weights. "eva", "corda", "lora_ga", "qera" and
    "cloq" need data: call `peftcore.initialize_from_data` after `get_peft_model`. "qera" and "cloq" also need a
    quantised base and its weights from before the quantisation.
    """
    loftq_config: dict[str, Any] | None = field(default_factory=dict)
    """{"loftq_bits": 4 or 8, "loftq_iter": alternations (count)}."""
    eva_config: dict[str, Any] | None = None
    """Options of "eva", as in HF PEFT's EvaConfig."""
    corda_config: dict[str, Any] | None = None
    """Options of "corda", as in HF PEFT's CordaConfig."""
    lora_ga_config: dict[str, Any] | None = None
    """Options of "lora_ga", as in HF PEFT's LoraGAConfig."""
    rank_pattern: dict[str, int] | None = field(default_factory=dict)
    """{path suffix or regular expression: r}; the first that matches a layer's path applies."""
    alpha_pattern: dict[str, float] | None = field(default_factory=dict)
    """{path suffix or regular expression: lora_alpha}."""
    layer_replication: list[tuple[int, int]] | None = None
    """Ranges of blocks, such as [(0, 4), (2, 5)], of which the deeper model consists; blocks share base weights."""
    target_parameters: list[str] | None = None
    """Path suffixes of raw parameters to adapt, such as "experts.gate_up_proj": (experts, ...) or (out, in)."""
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    """Token ids whose embedding rows train whole; {path suffix: ids} for other embeddings."""
    ensure_weight_tying: bool = False
    """Adapt or copy both layers of a tied pair of weights in the same way, so that they stay tied."""
    alora_invocation_tokens: list[int] | None = None
    """Token ids that switch the adapter on; it acts from their last occurrence (aLoRA)."""
    kasa_config: dict[str, Any] | None = None
    """Train B diag(λ) A beside the weight without its r smallest singular values (KaSA); see `KasaConfig`."""
    use_bdlora: dict[str, Any] | None = None
    """Make A or B block-diagonal (BD-LoRA); see `BdLoraConfig`."""
    use_qalora: bool = False
    """Give A the means of groups of inputs (QA-LoRA)."""
    qalora_group_size: int = 16
    """Inputs per group of `use_qalora` (count)."""
    velora_config: dict[str, Any] | None = None
    """Keep a compressed input for the gradient of A in training (VeLoRA); see `VeloraConfig`."""
    monteclora_config: dict[str, Any] | None = None
    """Compute with random samples around A in training (MonteCLoRA); see `MontecloraConfig`."""
    arrow_config: dict[str, Any] | None = None
    """Route each token to other LoRAs of the layer (Arrow); see `ArrowConfig` and `create_arrow_model`."""
    fan_in_fan_out: bool = False
    """Read and saved for PEFT; without effect, because the orientation is found per layer."""
    runtime_config: LoraRuntimeConfig = field(default_factory=LoraRuntimeConfig, repr=False)
    """Options that are not saved."""

    def __post_init__(self) -> None:
        # HF PEFT's converter of kohya_ss files gives (commonest value, its count) and names each layer in the pattern
        for name, pattern in (("r", self.rank_pattern), ("lora_alpha", self.alpha_pattern)):
            value = getattr(self, name)
            if pattern and isinstance(value, list | tuple) and len(value) == 2:
                setattr(self, name, value[0])
        if isinstance(options := cast(Any, self.runtime_config), dict):  # of `dataclasses.asdict`
            self.runtime_config = LoraRuntimeConfig(**options)
        super().__post_init__()
        self._convert_options()
        if self.runtime_config.ephemeral_gpu_offload and not self.use_dora:
            warnings.warn(
                "LoraConfig: ephemeral_gpu_offload acts on use_dora=True only; leave it out for this configuration",
                stacklevel=3,
            )
        self.positive("r")
        self.probability("lora_dropout")
        self.one_of("bias", self.bias, ("none", "all", "lora_only"))
        for name, defaults in self.initialisation().required_options.items():
            if getattr(self, name) is None:
                warnings.warn(
                    f"`init_lora_weights` is {self.init_lora_weights!r} but `{name}` is not specified; it "
                    f"is set to the defaults {defaults}",
                    stacklevel=4,
                )
                setattr(self, name, dict(defaults))
        for start in ("loftq", "eva", "corda", "lora_ga"):
            if getattr(self, f"{start}_config") and str(self.init_lora_weights).lower() != start:
                warnings.warn(
                    f"LoraConfig: {start}_config has no effect with init_lora_weights={self.init_lora_weights!r}; set "
                    f"it to {start!r}, or leave {start}_config out",
                    stacklevel=4,
                )
        for variant in self.variants():
            variant.check(self)
            for other, reason in variant.excludes.items():
                if getattr(self, other):
                    raise ConfigError(f"LoraConfig: {variant.option} and {other} exclude each other: {reason}")
        alone = [variant.option for variant in self.variants() if variant.stands_alone]
        if len(alone) > 1:
            raise ConfigError(
                f"LoraConfig: {' and '.join(alone)} exclude each other: each computes the change in its own way"
            )
        if self.packs_factors and self.init_lora_weights not in (True, False, "gaussian"):
            raise ConfigError(
                f"LoraConfig: init_lora_weights={self.init_lora_weights!r} computes whole factors A and B, and this "
                "variant trains parts of them; use init_lora_weights=True"
            )
        if self.qalora_group_size != 16 and not self.use_qalora:
            warnings.warn(
                "LoraConfig: qalora_group_size has no effect without use_qalora=True; leave it out", stacklevel=4
            )
        if self.lora_dropout and self.target_parameters:
            raise ConfigError(
                "LoraConfig: lora_dropout and target_parameters exclude each other: a raw parameter's input is not "
                "seen; set lora_dropout=0"
            )

    def _convert_options(self) -> None:
        """Convert plain dictionaries, such as those of a file, to the variants' classes of options."""
        for variant in variants():
            value = getattr(self, variant.option, None)
            if variant.options_class is not None and value is not None:
                setattr(self, variant.option, variant.options_class.made_from(value, variant.option))

    @classmethod
    def class_for(cls, keys: Collection[str]) -> type[PeftConfig]:
        classes = [v.config for v in variants() if v.config is not None and v.option in keys]
        if len(classes) < 2:
            return classes[0] if classes else cls
        return make_dataclass(cls.__name__, [], bases=tuple(dict.fromkeys(classes)))

    def without_effect(self) -> dict[str, str]:
        starts = ("loftq", "eva", "corda", "lora_ga")
        unused = [start for start in starts if getattr(self, f"{start}_config") and self.init_lora_weights != start]
        return {f"{start}_config": f"init_lora_weights={start!r}" for start in unused}

    # -- variants --------------------------------------------------------------------------------------------

    def variants(self) -> tuple[Variant, ...]:
        """Return the variants that this configuration chooses, the initialisation included."""
        chosen = vars(self).get(_CHOSEN)
        if chosen is None:
            chosen = vars(self)[_CHOSEN] = tuple(variant for variant in variants() if variant.is_chosen(self))
        return chosen

    def __setattr__(self, name: str, value: Any) -> None:
        vars(self).pop(_CHOSEN, None)
        super().__setattr__(name, value)

    def initialisation(self) -> Initialisation:
        """Return the initialisation that `init_lora_weights` names.

        Raises:
            ConfigError: For an unknown name.
        """
        for variant in self.variants():
            if isinstance(variant, Initialisation):
                return variant
        names = ", ".join(str(name) for v in variants() if isinstance(v, Initialisation) for name in v.names)
        raise ConfigError(f"LoraConfig: init_lora_weights must be one of {names}; got {self.init_lora_weights!r}")

    def observer(self, layers: "Mapping[str, Lora]") -> "Observer":
        """Return the observer of an initialisation that needs data, for the adapters by path."""
        kind = self.initialisation().observer
        assert kind is not None
        return kind(self, layers)

    def denominator(self, r: int) -> float:
        """Return d of the scaling s = α/d for rank r."""
        value: float = r
        for variant in self.variants():
            value = variant.denominator(r, value)
        return value

    # -- ranks -----------------------------------------------------------------------------------------------

    def at(self, path: str) -> tuple[int, float]:
        """Return (rank, alpha) of the layer at `path`, with `rank_pattern` and `alpha_pattern` applied."""
        return first_match(self.rank_pattern, path, self.r), first_match(self.alpha_pattern, path, self.lora_alpha)

    def with_ranks(self, ranks: Mapping[str, int], keep_alpha: bool = False) -> Self:
        """Return this configuration with a rank for each layer.

        Args:
            ranks: {path: rank}; layers of rank 0 are no longer targets.
            keep_alpha: True keeps each layer's α; False keeps each layer's scaling.
        """
        kept = {path: rank for path, rank in ranks.items() if rank}
        alphas: dict[str, float] = {}
        for path, rank in kept.items():
            old_rank, alpha = self.at(path)
            alphas[path] = alpha if keep_alpha else alpha * (self.denominator(rank) / self.denominator(old_rank))
        return replace(self, target_modules=sorted(kept), exclude_modules=None, rank_pattern=kept, alpha_pattern=alphas)

    def with_stacked_start(self) -> Self:
        """Return the configuration of the plain LoRA of rank 2r that equals an adapter with a subtracted start."""
        wider = self.denominator(2 * self.r) / self.denominator(self.r)
        return replace(
            self,
            r=2 * self.r,
            lora_alpha=wider * self.lora_alpha,
            rank_pattern={key: 2 * r for key, r in (self.rank_pattern or {}).items()},
            alpha_pattern={key: wider * alpha for key, alpha in (self.alpha_pattern or {}).items()},
            init_lora_weights=True,
            corda_config=None,
            lora_ga_config=None,
        )

    @property
    def packs_factors(self) -> bool:
        """True if A or B trains and is saved in another shape than A (r, i) and B (o, r)."""
        return any(variant.packs_factors for variant in self.variants())

    # -- hooks -----------------------------------------------------------------------------------------------

    @property
    def replaces_base(self) -> bool:
        return any(variant.replaces_base for variant in self.variants())

    @property
    def needs_data(self) -> bool:
        return self.initialisation().observer is not None

    @property
    def needs_original(self) -> bool:
        """True if the initialisation needs the weights from before the base was quantised."""
        observer = self.initialisation().observer
        return observer is not None and observer.needs_original

    def check_beside(self, other: PeftConfig) -> None:
        for variant in self.variants():
            variant.check_beside(self, other)

    @property
    def restricts_others(self) -> bool:
        return any(variant.restricts_others for variant in self.variants())

    def ranks(self) -> list[int]:
        return [self.r, *(self.rank_pattern or {}).values()]

    def token_configs(self) -> list[Any]:
        ids = self.trainable_token_indices
        if not ids:
            return []
        kind = cast(Any, method_named("TRAINABLE_TOKENS").config)
        by_target = ids.items() if isinstance(ids, dict) else [(None, ids)]
        return [kind(token_indices=list(tokens), target_modules=target and [target]) for target, tokens in by_target]

    def _register_custom_module(self, mapping: Mapping[type, type]) -> None:
        """Raise ConfigError: HF PEFT's classes of layers, from which a script derives its own, do not exist here."""
        raise ConfigError(
            f"LoraConfig: {[kind.__name__ for kind in mapping]} cannot get layers of a script's own, because peftcore "
            "has one class of layer for all; describe how the weight of such a module is read by "
            "peftcore.register_storage (docs/how-to/add-a-storage.md), or name its raw parameter in target_parameters"
        )

    def beyond_low_rank(self) -> str:
        return next((variant.beyond_low_rank for variant in self.variants() if variant.beyond_low_rank), "")

    def can_be_overwritten_by(self, other: PeftConfig) -> bool:
        if self.bias != "none" or self.modules_to_save or self.trainable_token_indices or self.layer_replication:
            return False
        if not is_lora(other) or not isinstance(self.init_lora_weights, bool):
            return False
        ours, theirs = self.to_dict(), other.to_dict()
        return all(ours[key] == theirs.get(key) for key in ours.keys() - _WITHOUT_EFFECT_ON_TENSORS)


def is_lora(config: object) -> TypeGuard[LoraConfig]:
    """Return whether `config` is a LoraConfig. An AdaLoraConfig is none here; for `isinstance` it is one."""
    return LoraConfig in type(config).__mro__
