"""Names of test losses in words, as pages, tables and messages show them.

A record describes its loss so that two versions can be compared: in plain words, or as the representation of the loss
object with all its options, such as `Kto(beta=0.1, loss='kto')`.
"""

import ast

_NAMES = {
    "Dpo": "DPO",
    "Orpo": "ORPO",
    "SimPo": "SimPO",
    "Kto": "KTO",
    "BradleyTerry": "Bradley-Terry loss",
    "Contrastive": "contrastive loss",
}
"""{class of a loss: its name}"""


def loss_in_words(description: str) -> str:
    """Return the name of a loss with its options, such as "KTO, beta 0.1"; a description in words is unchanged."""
    name, opened, _ = description.partition("(")
    if not opened or name not in _NAMES:
        return description
    call = ast.parse(description, mode="eval").body
    assert isinstance(call, ast.Call)
    options = {str(option.arg): ast.literal_eval(option.value) for option in call.keywords}
    return ", ".join([_NAMES[name], *(_option(key, value) for key, value in options.items() if value is not False)])


def _option(key: str, value: object) -> str:
    words = key.replace("_", " ")
    if value is True:
        return words
    return f"{value} {words}" if isinstance(value, str) else f"{words} {value:g}"
