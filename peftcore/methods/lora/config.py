"""LoRA's options under PEFT's names, and which of them exclude each other."""

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

from peftcore.config import PeftConfig, TunerConfig, first_match
from peftcore.errors import ConfigError, suggestion
from peftcore.registry import method_named

STARTS = ("gaussian", "orthogonal", "olora", "pissa", "loftq", "eva", "corda", "lora_ga")
"""Names that `init_lora_weights` may have, besides True, False and "pissa_niter_N"."""

_WITHOUT_EFFECT_ON_TENSORS = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "init_lora_weights",
    "revision",
    "task_type",
}


@dataclass
class LoraConfig(TunerConfig):
    """LoRA's options under PEFT's names."""

    ignored_on_disk: ClassVar[dict[str, Any]] = {
        "arrow_config": None,
        "kasa_config": None,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "monteclora_config": None,
        "qalora_group_size": 16,
        "use_bdlora": None,
        "use_qalora": False,
        "velora_config": None,
    }

    r: int = 8
    """Rank (count)."""
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    """Probability of dropping an element of the adapter's input while training."""
    use_rslora: bool = False
    """Scale by α/√r instead of α/r."""
    use_dora: bool = False
    """Learn the length of each row of W' apart from its direction (DoRA)."""
    bias: str = "none"
    """Which biases of the model train too: "none", "all" or "lora_only"."""
    lora_bias: bool = False
    """Give B a bias of its own."""
    init_lora_weights: bool | str = True
    """Where training begins. True: B is zero; False: random, for tests; or a name among `STARTS`.

    "pissa", "pissa_niter_N", "olora" and "loftq" need only the weights. "eva", "corda" and "lora_ga" look at data:
    call `peftcore.init.initialize_from_data` after `get_peft_model`.
    """
    loftq_config: dict[str, Any] | None = field(default_factory=dict)
    """{"loftq_bits": 4 or 8, "loftq_iter": alternations (count)}."""
    eva_config: dict[str, Any] | None = None
    corda_config: dict[str, Any] | None = None
    lora_ga_config: dict[str, Any] | None = None
    rank_pattern: dict[str, int] | None = field(default_factory=dict)
    """{path suffix or regular expression: r}; the first that matches a layer's path wins."""
    alpha_pattern: dict[str, float] | None = field(default_factory=dict)
    layer_replication: list[tuple[int, int]] | None = None
    """Ranges of blocks, such as [(0, 4), (2, 5)], that the deeper model is made of; blocks share base weights."""
    target_parameters: list[str] | None = None
    """Path suffixes of raw parameters to adapt, such as "experts.gate_up_proj": (experts, ...) or (out, in)."""
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    """Rows of the embedding that train whole, by token id; {path suffix: ids} for other embeddings."""
    ensure_weight_tying: bool = False
    """Adapt or copy both sides of a tied pair alike."""
    alora_invocation_tokens: list[int] | None = None
    """Token ids that switch the adapter on; it acts from the last place where they stand (aLoRA)."""
    fan_in_fan_out: bool = False
    """Read from disk for PEFT's sake; the orientation is found per layer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("r")
        self.probability("lora_dropout")
        self.one_of("bias", self.bias, ("none", "all", "lora_only"))
        self._check_start()
        self._check_exclusions()

    def _check_start(self) -> None:
        start = self.init_lora_weights
        if not isinstance(start, bool) and start not in STARTS and not re.fullmatch(r"pissa_niter_\d+", str(start)):
            raise ConfigError(
                f"LoraConfig: init_lora_weights must be True, False, 'pissa_niter_N' or one of {', '.join(STARTS)}; "
                f"got {start!r}"
            )
        if start == "loftq":
            self._check_loftq(self.loftq_config or {})
        ranks = [self.r, *(self.rank_pattern or {}).values()]
        if start == "orthogonal" and any(r % 2 for r in ranks):
            raise ConfigError(f"LoraConfig: init_lora_weights='orthogonal' needs even ranks; got {ranks}")

    def _check_loftq(self, options: dict[str, Any]) -> None:
        for key in options:
            if key not in (known := ["loftq_bits", "loftq_iter"]):
                raise ConfigError(f"LoraConfig: loftq_config has no {key!r}{suggestion(key, known)}")
        if (bits := options.get("loftq_bits", 4)) not in (4, 8):
            raise ConfigError(f"LoraConfig: loftq_config['loftq_bits'] must be 4 or 8; got {bits!r}")
        if not isinstance(turns := options.get("loftq_iter", 1), int) or turns < 1:
            raise ConfigError(
                f"LoraConfig: loftq_config['loftq_iter'] must be a positive integer; got {turns!r}; try 1"
            )

    def _check_exclusions(self) -> None:
        special = {
            "use_dora": self.use_dora,
            "lora_bias": self.lora_bias,
            "alora_invocation_tokens": self.alora_invocation_tokens is not None,
            "target_parameters": bool(self.target_parameters),
            "lora_dropout": self.lora_dropout > 0,
        }
        for one, other, why in (
            ("use_dora", "lora_bias", "DoRA rescales rows of W, and a bias is not in them"),
            ("use_dora", "alora_invocation_tokens", "DoRA changes every position, aLoRA only some"),
            ("use_dora", "target_parameters", "raw parameters take plain LoRA only"),
            ("lora_bias", "target_parameters", "a raw parameter has no bias"),
            ("lora_dropout", "target_parameters", "its input is not seen; set lora_dropout=0"),
        ):
            if special[one] and special[other]:
                raise ConfigError(f"LoraConfig: {one} and {other} exclude each other: {why}")
        if self.alora_invocation_tokens is not None and not self.alora_invocation_tokens:
            raise ConfigError("LoraConfig: alora_invocation_tokens is empty; give the ids that switch the adapter on")

    def at(self, path: str) -> tuple[int, float]:
        """Return (rank, alpha) of the layer at `path`, patterns applied."""
        return first_match(self.rank_pattern, path, self.r), first_match(self.alpha_pattern, path, self.lora_alpha)

    def ranks(self) -> list[int]:
        return [self.r, *(self.rank_pattern or {}).values()]

    def token_configs(self) -> list[TunerConfig]:
        ids = self.trainable_token_indices or {}
        kind: Any = method_named("TRAINABLE_TOKENS").config
        by_target = ids.items() if isinstance(ids, dict) else [(None, ids)]
        return [kind(token_indices=list(tokens), target_modules=target and [target]) for target, tokens in by_target]

    @property
    def replaces_base(self) -> bool:
        return self.init_lora_weights == "loftq"

    @property
    def needs_data(self) -> bool:
        return self.init_lora_weights in ("eva", "corda", "lora_ga")

    def can_be_overwritten_by(self, other: PeftConfig) -> bool:
        if self.bias != "none" or self.modules_to_save or self.trainable_token_indices or self.layer_replication:
            return False
        if not isinstance(other, LoraConfig) or not isinstance(self.init_lora_weights, bool):
            return False
        ours, theirs = self.to_dict(), other.to_dict()
        return all(ours[key] == theirs.get(key) for key in ours.keys() - _WITHOUT_EFFECT_ON_TENSORS)
