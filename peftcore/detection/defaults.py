"""Default targets of a method: rules over layer roles, and a table of families with other defaults.

The defaults are HF PEFT's for the families that HF PEFT knows.
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from peftcore.detection.roles import ATTENTION, FEED_FORWARD, Role

NORMS = "LN_TUNING"
"""`peft_type` of the method that adapts norms only."""


class Practice(NamedTuple):
    """An exception from the rules for some families and methods."""

    families: str
    """Values of `config.model_type`, separated by spaces."""
    methods: str
    """Values of `peft_type`, separated by spaces; "" for every method without a rule or an earlier entry."""
    roles: tuple[Role, ...]
    reason: str


PRACTICE = (
    Practice("phi", "VERA PVERA FROD SHIRA", ("query", "value"), "matrices shared by layers need equal shapes"),
    Practice("phi", "", ("query", "value", "up", "down"), "Phi's own fine-tuning recipe adapts the MLP as well"),
    Practice(
        "nemotron_h",
        "",
        ("query", "key", "value", "output"),
        "few blocks have attention, so all their projections are adapted",
    ),
    Practice(
        "rwkv",
        "",
        ("query", "key", "value", "output", "up", "down", "unknown"),
        "its channel mix does not have an MLP's shapes",
    ),
    Practice(
        "t5 mt5 bart opt deberta-v2",
        "ADALORA VBLORA",
        (*ATTENTION, *FEED_FORWARD),
        "AdaLoRA's paper spreads the budget over every matrix; HF PEFT does so for these families only",
    ),
    Practice("roberta", "ADALORA", (*ATTENTION, *FEED_FORWARD), "as for t5 and the other families above"),
    Practice(
        "gpt2 gpt_bigcode",
        "FOURIERFT C3A WAVEFT",
        ("down",),
        "one spectrum over a fused projection would mix query, key and value",
    ),
    Practice("opt", "IA3", ("query", "key", "down"), "PEFT's default; the paper scales key and value"),
    Practice(
        "bart gemma gemma2 gemma3_text gpt_neo gptj llama4 phi qwen2 qwen3",
        "IA3",
        ("query", "value", "down"),
        "PEFT's default; the paper scales key and value",
    ),
)

GIVEN_TARGETS: dict[str, dict[str, Any]] = {}
"""{peft_type: {model_type: target_modules}} that a program has set in place of the defaults."""
GIVEN_FEEDFORWARD: dict[str, Any] = {}
"""{model_type: feedforward_modules of IA3} that a program has set in place of the defaults."""

RULES: dict[str, tuple[Role, ...]] = {
    "IA3": ("key", "value", "fused_qkv", "fused_kv", "down"),
    "BEFT": ("value", "fused_qkv", "fused_kv"),
    "OSF": (*ATTENTION, *FEED_FORWARD),
}
"""{peft_type: roles} of methods whose papers target other layers than LoRA."""


def target_names(method: str, family: str, roles: Mapping[str, Role], readers: Collection[str]) -> list[str]:
    """Return the names that a method adapts by default.

    Args:
        method: A `peft_type`.
        family: The model's `config.model_type`.
        roles: {name for `target_modules`: role}.
        readers: Names of the layers whose input has the block's width.
    """
    for practice in PRACTICE:
        applies = method in practice.methods.split() or (not practice.methods and method not in RULES)
        if family in practice.families.split() and applies:
            return _having(roles, *practice.roles)
    ruled = _having(roles, *RULES.get(method, ()))
    return ruled if any(roles[name] in ATTENTION for name in ruled) else _like_lora(roles, readers) + ruled


def _having(roles: Mapping[str, Role], *wanted: Role) -> list[str]:
    return [name for name, role in roles.items() if role in wanted]


def _like_lora(roles: Mapping[str, Role], readers: Collection[str]) -> list[str]:
    """Return query and value; without attention the mixer layers that read the block's width, else all inner layers."""
    attention = _having(roles, "query", "value", "fused_qkv")
    if not any(roles[name] in ("value", "fused_qkv") for name in attention):
        attention += _having(roles, "fused_kv") or _having(roles, "key")
    # fused kernels use the weights of a mixer's later layers without calling the layers
    mixers = [name for name in _having(roles, "mixer") if name in readers]
    return attention or mixers or _having(roles, *FEED_FORWARD, "unknown") or _having(roles, "convolution")
