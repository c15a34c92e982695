"""Values of the demonstration that are still in params.yaml although data.source names other data.

params.yaml ships with the choices of one task: docstrings of the standard library. For other data these values look
plausible and are wrong: every row gets the system prompt, and versions are registered under the name.
"""

from typing import Any

from flows.params.data import DEMONSTRATION, DEMONSTRATION_PROMPT
from flows.params.params import Params

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
"""Limits that fit the demonstration's short answers."""


def left_over(params: Params) -> list[str]:
    """Return a warning for each value of the demonstration that remains with other data; [] if there is none."""
    if params.data.source == DEMONSTRATION:
        return []
    warnings, source = [], f"data.source is {params.data.source}"
    if params.project.name == NAME:
        warnings.append(
            f"project.name is the demonstration's, {NAME}, but {source}: versions are registered under it; give a name "
            "of your own, here and under `artifacts:` in dvc.yaml"
        )
    if params.data.system_prompt == DEMONSTRATION_PROMPT and params.data.kind not in ("classification", "retrieval"):
        warnings.append(
            f"data.system_prompt is the demonstration's, {DEMONSTRATION_PROMPT!r}, but {source}: every row without a "
            "system prompt gets it; give your own, or null"
        )
    values = {f"{section}.{key}": getattr(getattr(params, section), key) for section, key in LIMITS}
    if list(values.values()) == list(LIMITS.values()):
        listed = ", ".join(f"{name} {value:g}" for name, value in values.items())
        warnings.append(
            f"limits are all the demonstration's, but {source}: {listed}; check which of them fit your rows"
        )
    return warnings
