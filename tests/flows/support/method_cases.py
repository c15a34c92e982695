"""All methods by their names in params.yaml, and parameters that name one."""

from typing import Any

from flows.params import Params
from peftcore.registry import tuner_names

GIVEN: dict[str, Any] = {"r": 6, "lora_alpha": 24.0, "lora_dropout": 0.125}
"""Values of the options that several methods share; none is a default."""
NEEDED: dict[str, dict[str, Any]] = {
    "trainable_tokens": {"token_indices": [1]},
    "xlora": {"hidden_size": 8, "adapters": {"1": "there"}},
}
"""{method: options without which it has no configuration}"""
METHODS = [name.lower() for name in tuner_names()]


def method(name: str, **options: Any) -> Params:
    """Return parameters with this method."""
    return Params.model_validate({"method": {"name": name, "options": NEEDED.get(name, {}), **options}})
