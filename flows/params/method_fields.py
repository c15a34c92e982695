"""Mapping of `method.r`, `lora_alpha` and `lora_dropout` in params.yaml to the fields of each method's configuration.

A field is listed only if it has this meaning: `r` is a rank, `lora_alpha / r` the scaling of the update, `lora_dropout`
the dropout probability of the adapter's input elements. OFT's `r` counts blocks, RandLoRA's `r` is the rank of one of
many bases, SHiRA's `r` counts entries, and LoHa drops whole rows. Such fields are given under `method.options`.

This module imports no method, so params.yaml can be read without torch.
"""

from collections.abc import Mapping

SHARED = ("r", "lora_alpha", "lora_dropout")
"""Options of `method` that several methods share."""

FIELDS: Mapping[str, Mapping[str, str]] = {
    "adalora": {"lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"},
    "deft": {"r": "r", "lora_dropout": "deft_dropout"},
    "delora": {"r": "r", "lora_dropout": "module_dropout"},
    "frod": {"lora_dropout": "frod_dropout"},
    "glora": {"r": "r"},
    "gralora": {"r": "r", "lora_alpha": "alpha", "lora_dropout": "gralora_dropout"},
    "hira": {"r": "r", "lora_dropout": "hira_dropout"},
    "hra": {"r": "r"},
    "lily": {"r": "r"},
    "loha": {"r": "r", "lora_alpha": "alpha"},
    "lokr": {"r": "r", "lora_alpha": "alpha"},
    "lora": {"r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"},
    "miss": {"r": "r", "lora_dropout": "miss_dropout"},
    "peanut": {"r": "r"},
    "poly": {"r": "r"},
    "psoft": {"r": "r", "lora_dropout": "psoft_dropout"},
    "pvera": {"r": "r", "lora_dropout": "pvera_dropout"},
    "randlora": {"lora_dropout": "randlora_dropout"},
    "supertuning": {"r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"},
    "unilora": {"r": "r", "lora_dropout": "unilora_dropout"},
    "tinylora": {"r": "r", "lora_dropout": "tinylora_dropout"},
    "vblora": {"r": "r", "lora_dropout": "vblora_dropout"},
    "vera": {"r": "r", "lora_dropout": "vera_dropout"},
}
"""{method: {option of `method`: field of the method's configuration}}; other methods have none of the options."""

ALTERNATIVES: Mapping[str, Mapping[str, str]] = {
    "adalora": {"r": "options.init_r and options.target_r"},
    "boft": {"lora_dropout": "options.boft_dropout, a share of blocks"},
    "bottleneck": {
        "r": "options.bottleneck_size",
        "lora_alpha": "options.scaling",
        "lora_dropout": "options.dropout, of the adapter's output",
    },
    "deft": {"lora_alpha": "options.alpha, which scales the refill alone"},
    "delora": {"lora_alpha": "options.delora_lambda"},
    "fourierft": {"r": "options.n_frequency", "lora_alpha": "options.scaling"},
    "frod": {"r": "options.sparse_rate, the share of entries that train"},
    "lily": {"lora_alpha": "options.scaling"},
    "loha": {"lora_dropout": "options.rank_dropout or options.module_dropout"},
    "lokr": {"lora_dropout": "options.rank_dropout or options.module_dropout"},
    "oft": {"r": "options.r (blocks) or options.oft_block_size", "lora_dropout": "options.module_dropout, of blocks"},
    "peanut": {"lora_alpha": "options.scaling"},
    "osf": {"r": "options.effective_rank, of the directions that stay"},
    "randlora": {"r": "options.r, the rank of one basis", "lora_alpha": "options.randlora_alpha"},
    "shira": {"r": "options.r, by which it counts entries"},
    "waveft": {"r": "options.n_frequency", "lora_alpha": "options.scaling"},
}
"""{method: {option that the method lacks: what to give instead}}"""


def missing_option(method: str, option: str, value: float | str) -> str | None:
    """Return what to give instead of an option that the method lacks; None if the method has the option.

    Args:
        method: The method's name, in lower case.
        option: One of `SHARED`.
        value: The option's value in params.yaml. A dropout of 0 fits every method.
    """
    if option in FIELDS.get(method, {}) or (option == "lora_dropout" and value == 0):
        return None
    alternative = ALTERNATIVES.get(method, {}).get(option)
    return f"{method} has no such option; give null" + (f", and {alternative}" if alternative else "")
