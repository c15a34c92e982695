"""What of the demonstration still stands in the parameters of somebody who brought data of his own.

params.yaml comes with the choices of one task: docstrings of the standard library. Of other data they are wrong without
looking so: every row begins with its system prompt, and versions are registered under its name.
"""

from typing import Any

from flows.params.model import DEMONSTRATION, DEMONSTRATION_PROMPT, Params

NAME = "docstrings"
LIMITS: dict[tuple[str, str], Any] = {
    ("data", "max_length"): 320,
    ("data", "train_rows"): 1200,
    ("data", "validation_rows"): 96,
    ("data", "test_rows"): 256,
    ("evaluate", "max_new_tokens"): 40,
    ("gate", "min_loss_gain"): 0.5,
    ("gate", "min_rouge_l_gain"): 0.05,
}
"""Limits that fit short answers to functions."""


def left_over(params: Params) -> list[str]:
    """Return, in sentences, what is the demonstration's though the data are not; nothing if there is none of it."""
    if params.data.source == DEMONSTRATION:
        return []
    told, source = [], f"data.source is {params.data.source}"
    if params.project.name == NAME:
        told.append(
            f"project.name is the demonstration's, {NAME}, but {source}: versions are registered under it; give a name "
            "of your own, here and under `artifacts:` in dvc.yaml"
        )
    if params.data.system_prompt == DEMONSTRATION_PROMPT and params.data.kind != "classification":
        told.append(
            f"data.system_prompt is the demonstration's, {DEMONSTRATION_PROMPT!r}, but {source}: it goes before every "
            "row that has none; give your own, or null"
        )
    values = {f"{section}.{key}": getattr(getattr(params, section), key) for section, key in LIMITS}
    if list(values.values()) == list(LIMITS.values()):
        listed = ", ".join(f"{name} {value:g}" for name, value in values.items())
        told.append(f"limits are all the demonstration's, but {source}: {listed}; look which of them fit your rows")
    return told
