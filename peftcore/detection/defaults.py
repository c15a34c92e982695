"""Which layers a method adapts when nobody names any: rules over roles, and a small table where practice differs.

The practice is HF PEFT's, so that a default means the same layers in both.
"""

from collections.abc import Collection, Mapping
from typing import NamedTuple

from peftcore.detection.roles import ATTENTION, FEED_FORWARD, Role

NORMS = "LN_TUNING"
"""The method that adapts norms and no other layer."""


class Practice(NamedTuple):
    """Families in which practice differs from the rule."""

    families: str
    methods: str
    """Values of `peft_type`; "" for every method without a rule or an earlier entry of its own."""
    roles: tuple[Role, ...]
    reason: str


PRACTICE = (
    Practice("phi", "VERA PVERA FROD SHIRA", ("query", "value"), "matrices shared by layers want equal shapes"),
    Practice("phi", "", ("query", "value", "up", "down"), "Phi's own fine-tuning recipe adapts the MLP as well"),
    Practice("nemotron_h", "", ("query", "key", "value", "output"), "few blocks attend, so those are adapted whole"),
    Practice(
        "rwkv", "", ("query", "key", "value", "output", "up", "down", "unknown"), "its channel mix is no MLP by shape"
    ),
    Practice(
        "t5 mt5 bart opt deberta-v2",
        "ADALORA VBLORA",
        (*ATTENTION, *FEED_FORWARD),
        "AdaLoRA's paper spreads the budget over every matrix; PEFT's defaults do so for these only",
    ),
    Practice("roberta", "ADALORA", (*ATTENTION, *FEED_FORWARD), "the same"),
    Practice(
        "gpt2 gpt_bigcode", "FOURIERFT C3A WAVEFT", ("down",), "one spectrum over a fused projection mixes its parts"
    ),
    Practice("opt", "IA3", ("query", "key", "down"), "PEFT's default; the paper scales key and value"),
    Practice(
        "bart gemma gemma2 gemma3_text gpt_neo gptj llama4 phi qwen2 qwen3",
        "IA3",
        ("query", "value", "down"),
        "PEFT's default; the paper scales key and value",
    ),
)

RULES: dict[str, tuple[Role, ...]] = {
    "IA3": ("key", "value", "fused_qkv", "fused_kv", "down"),
    "BEFT": ("value", "fused_qkv", "fused_kv"),
    "OSF": (*ATTENTION, *FEED_FORWARD),
}
"""{peft_type: roles} of the methods whose papers do not adapt what LoRA adapts."""


def target_names(method: str, family: str, roles: Mapping[str, Role], readers: Collection[str]) -> list[str]:
    """Names out of `roles` {name: role} that `method` adapts in a model of this family.

    readers: names of the layers that read the block's own width.
    """
    for practice in PRACTICE:
        ours = method in practice.methods.split() or (not practice.methods and method not in RULES)
        if family in practice.families.split() and ours:
            return _having(roles, *practice.roles)
    ruled = _having(roles, *RULES.get(method, ()))
    return ruled if any(roles[name] in ATTENTION for name in ruled) else _like_lora(roles, readers) + ruled


def _having(roles: Mapping[str, Role], *wanted: Role) -> list[str]:
    return [name for name, role in roles.items() if role in wanted]


def _like_lora(roles: Mapping[str, Role], readers: Collection[str]) -> list[str]:
    """Query and value; in a model without attention what reads the block's width in a mixer, else all inside."""
    attention = _having(roles, "query", "value", "fused_qkv")
    if not any(roles[name] in ("value", "fused_qkv") for name in attention):
        attention += _having(roles, "fused_kv") or _having(roles, "key")
    # fused kernels read the weights of a mixer's later layers without calling them
    mixers = [name for name in _having(roles, "mixer") if name in readers]
    return attention or mixers or _having(roles, *FEED_FORWARD, "unknown") or _having(roles, "convolution")
