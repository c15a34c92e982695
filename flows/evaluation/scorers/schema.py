"""Built-in scorer of answers in JSON."""

import json
from pathlib import Path
from typing import Any

from flows.errors import StageError
from flows.evaluation.scorers.texts import Score, unfenced


def json_schema(*, schema: dict[str, Any] | str) -> Score:
    """Return a scorer: 1 if the answer, or its first fenced block, is JSON that fits the schema, else 0.

    Args:
        schema: A JSON schema, or the path of a file with one.
    """
    try:
        from jsonschema.exceptions import SchemaError
        from jsonschema.validators import validator_for
    except ImportError as error:
        raise StageError(
            f"the scorer json_schema needs jsonschema ({error}); install it with `pip install 'peftcore[scorers]'`, or "
            "remove it from evaluate.scorers"
        ) from error
    content = json.loads(Path(schema).read_text(encoding="utf-8")) if isinstance(schema, str) else schema
    kind = validator_for(content)
    try:
        kind.check_schema(content)
    except SchemaError as error:
        raise ValueError(f"schema is no JSON schema: {error.message}") from error
    validator = kind(content)

    def score(prompt: str, answer: str, reference: str, row: dict[str, Any]) -> float:
        try:
            value = json.loads(unfenced(answer))
        except (json.JSONDecodeError, RecursionError):
            return 0.0
        return float(validator.is_valid(value))

    return score
