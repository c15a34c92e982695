"""Reader for a typed YAML file. Each problem is reported with its line, the value, what fits and a suggestion."""

import copy
import difflib
import re
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeGuard, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from flows.errors import ParamsError
from peftcore.files import read_limited

Place = tuple[int | str, ...]
DEEPEST = 8
"""Levels of nesting (count); an alias such as `&a [*a]` nests without end."""
MOST_VALUES = 10_000
"""Keys and items (count), aliases expanded; a few lines of nested aliases can expand to billions."""
LARGEST_FILE = 256 << 10
"""Bytes."""
SECRETS = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{30,}",
    "a W&B API key": r"\bwandb_v\d_\w{30,}|(?<![@\w])[0-9a-f]{40}(?!\w)",
    "an AWS access key": r"\b(AKIA|ASIA)[0-9A-Z]{16}\b",
    "a GitHub token": r"\b(gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,})",
    "an API key": r"\bsk-[A-Za-z0-9_-]{20,}",
    "a secret of webhooks": r"\bwhsec_[A-Za-z0-9+/=]{16,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY",
    "a password in an address": r"\w://[^/\s:@]*:[^/\s@]+@",
}
"""{kind of secret: its pattern}; 40 hex digits after @ are a commit, as in hub:NAME@REVISION, and no key."""
_CONFLICT = re.compile(r"^<{7} ", re.MULTILINE)
"""First line of a merge conflict of git."""
_ADVICE = {
    "constructor for the tag": "write a text, a number or a list without a tag (`yaml.safe_dump` writes no such tags)",
    r"character '\t'": "indent by spaces, not by a tab",
    "another document": "write one document, without lines of `---` or `...`",
}
"""{part of a parser's message: what to do}"""
Model = TypeVar("Model", bound=BaseModel)


def read_params(path: Path, model: type[Model], context: Any = None) -> Model:
    """Read the file at `path` as `model`.

    Args:
        path: A YAML file.
        model: The model of the whole file.
        context: Value for the validators of the model (pydantic's validation context).

    Raises:
        ParamsError: The file is missing or invalid. The message has one line per problem, in the file's order.
    """
    data, lines, problems = _read(path)
    try:
        params = model.model_validate(data, context=context)
    except ValidationError as error:
        problems += [_problem(details, model, lines) for details in error.errors()]
    else:
        if not problems:
            return params
    raise _as_error(path, problems)


def read_some(path: Path, model: type[BaseModel]) -> dict[str, Any]:
    """Read a file with some of the keys of `model`, each checked alone: other keys decide whether it fits them.

    Args:
        path: A YAML file.
        model: The model of a file with all keys.

    Returns:
        The values as in the file.

    Raises:
        ParamsError: The file is missing or has wrong keys or values. The message has one line per problem.
    """
    data, lines, problems = _read(path)
    try:
        model.model_validate(data)
    except ValidationError as error:
        alone = [details for details in error.errors() if not details.get("ctx", {}).get("key")]
        problems += [_problem(details, model, lines) for details in alone]
    if problems:
        raise _as_error(path, problems)
    return data


def _read(path: Path) -> tuple[Any, dict[Place, int], list[tuple[int, str]]]:
    """Return the file's values, lines and problems, as `_parsed` does; the caller may change them."""
    try:
        text = read_limited(path, LARGEST_FILE).decode()
    except FileNotFoundError as error:
        raise ParamsError(f"{path}: cannot be read ({error}); run this where {path.name} is") from error
    except (OSError, ValueError) as error:
        raise ParamsError(f"{path}: cannot be read ({error}); make it a readable text file in UTF-8") from error
    return copy.deepcopy(_parsed(text, path.name))


def _as_error(path: Path, problems: list[tuple[int, str]]) -> ParamsError:
    return ParamsError("\n".join(f"{path.name}:{line}: {problem}" for line, problem in sorted(problems)))


@lru_cache(maxsize=4)
def _parsed(text: str, name: str) -> tuple[Any, dict[Place, int], list[tuple[int, str]]]:
    """Return the values, the line of each place, and the problems of repeated keys, each with its line.

    Cached, because one command reads params.yaml several times and parsing it takes a quarter of a second.

    Args:
        text: The file's text.
        name: The file's name, for messages.

    Raises:
        ParamsError: The text is not YAML, or it holds a secret.
    """
    lines: dict[Place, int] = {(): 1}
    try:
        root = YAML(typ="safe", pure=True).compose(text)
        if not isinstance(root, MappingNode):
            raise ParamsError(f"{name}:1: expected sections such as `data:`, each with its keys below it")
        _refuse_secrets(root, name)
        problems = _repeated_keys(root, (), lines)
        return YAML(typ="safe", pure=True).constructor.construct_document(root), lines, problems
    except YAMLError as error:
        if conflict := _CONFLICT.search(text):
            line = text.count("\n", 0, conflict.start()) + 1
            raise ParamsError(
                f"{name}:{line}: a merge conflict of git begins here; keep one of its sides, and remove the marks"
            ) from error
        raise ParamsError(f"{name}:{_line_of(error)}: not valid YAML: {_reason(error)}") from error
    except ParamsError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ParamsError(f"{name}: not valid YAML: {reason}") from error


def _refuse_secrets(root: Node, name: str) -> None:
    """Raise ParamsError for a value that looks like a secret: git, the registry's tags and W&B would publish it."""
    todo, seen = [root], set()
    while todo:
        node = todo.pop()
        if id(node) in seen:  # an alias
            continue
        seen.add(id(node))
        if isinstance(node, MappingNode):
            todo += [part for pair in node.value for part in pair]
        elif isinstance(node, SequenceNode):
            todo += node.value
        elif secret := next((kind for kind, form in SECRETS.items() if re.search(form, str(node.value))), None):
            raise ParamsError(
                f"{name}:{node.start_mark.line + 1}: this looks like {secret}; {name} is committed, so remove "
                "the secret, revoke it, and give a new one in the environment or in .dvc/config.local"
            )


def _line_of(error: YAMLError) -> int:
    mark = (error.problem_mark or error.context_mark) if isinstance(error, MarkedYAMLError) else None
    return mark.line + 1 if mark else 1


def _reason(error: YAMLError) -> str:
    problem = str(error.problem) if isinstance(error, MarkedYAMLError) else str(error).splitlines()[0]
    return problem + next((f"; {advice}" for part, advice in _ADVICE.items() if part in problem), "")


def _repeated_keys(node: Node, place: Place, lines: dict[Place, int]) -> list[tuple[int, str]]:
    """Record the line of each place in `lines`; report repeated keys and remove them from the tree."""
    if len(place) > DEEPEST:
        raise ParamsError(f"line {node.start_mark.line + 1} is nested too deeply (or within itself)")
    if len(lines) > MOST_VALUES:
        raise ParamsError(f"line {node.start_mark.line + 1} makes more than {MOST_VALUES:,} values; give fewer")
    problems: list[tuple[int, str]] = []
    if isinstance(node, SequenceNode):
        for index, item in enumerate(node.value):
            lines[*place, index] = item.start_mark.line + 1
            problems += _repeated_keys(item, (*place, index), lines)
    if not isinstance(node, MappingNode):
        return problems
    unique = []
    for key, value in node.value:
        here, line = (*place, str(key.value)), key.start_mark.line + 1
        if here in lines:
            problems.append((line, f"{_dotted(here)}: given before, in line {lines[here]}; remove one"))
            continue
        lines[here] = line
        unique.append((key, value))
        problems += _repeated_keys(value, here, lines)
    node.value = unique
    return problems


def _problem(error: ErrorDetails, model: type[BaseModel], lines: dict[Place, int]) -> tuple[int, str]:
    place, value, context = error["loc"], error["input"], error.get("ctx", {})
    if error["type"] == "invalid_key":
        place = (*place[:-1], _shown(value))  # pydantic calls the key `true` 1
    if context.get("key"):
        parts = context["key"].split(".")
        place, value = (*place, *(int(part) if part.isdecimal() else part for part in parts)), context["value"]
    line = next(lines[place[:end]] for end in range(len(place), -1, -1) if place[:end] in lines)
    section = section_at(model, place[:-1])
    if error["type"] == "extra_forbidden":
        if new := getattr(section, "renamed", {}).get(place[-1]):
            return line, f"{_dotted(place)}: renamed; write {new}"
        known = list(section.model_fields) if section else []
        return line, f"{_dotted(place)}: unknown key; {suggest(str(place[-1]), known, 'give one of ')}"
    if error["type"] == "invalid_key":
        if value is True and "on" in getattr(section, "model_fields", {}):
            return line, f"{_dotted(place)}: unknown key; write on (PyYAML reads on as true, ruamel.yaml does not)"
        return line, f"{_dotted(place)}: the key is no text; write a name"
    expected = _expected(error, value, section.model_json_schema() if section else {})
    return line, f"{_dotted(place)}: {_shown(value)} does not fit; {expected}"


def _expected(error: ErrorDetails, value: Any, schema: dict[str, Any]) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind == "invalid_value":
        return context["expected"]
    if kind == "literal_error":
        options = [option.strip("'") for option in context["expected"].replace(" or ", ", ").split(", ")]
        return suggest(str(value), options, "give one of ")
    if kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number"):
        # a section that a text can stand for has two forms
        (fields,) = [form["properties"] for form in schema.get("anyOf", [schema]) if "properties" in form]
        return "give a number " + _range(fields[error["loc"][-1]])
    if kind in _TYPES:
        return "give " + _TYPES[kind] + _unquoted(value, kind)
    return error["msg"][0].lower() + error["msg"][1:]


def _range(schema: dict[str, Any]) -> str:
    """Return the bounds of a number in a JSON schema, in words."""
    words = {
        "minimum": "of at least",
        "exclusiveMinimum": "above",
        "maximum": "of at most",
        "exclusiveMaximum": "below",
    }
    bounds = [
        f"{word} {option[key]:g}"
        for option in schema.get("anyOf", [schema])
        for key, word in words.items()
        if key in option
    ]
    return " and ".join(bounds) or "that is finite"


_TYPES = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "model_type": "a section: keys, indented below it",
    "string_too_short": "text that is not empty",
    "string_pattern_mismatch": "lower-case letters, digits and hyphens, a letter first",
}


def _unquoted(value: Any, kind: str) -> str:
    """Return the advice to remove the quotes around a number or truth value; "" if that does not apply."""
    if not isinstance(value, str) or kind == "string_type":
        return ""
    looks_plain = re.fullmatch(r"[+-]?[\w.]{1,40}([eE][+-]?\d+)?", value, re.ASCII)
    plain = YAML(typ="safe", pure=True).load(value) if looks_plain else None
    fits = {"bool_type": bool, "float_type": (int, float)}.get(kind, int)
    right = isinstance(plain, fits) and isinstance(plain, bool) == (kind == "bool_type")
    return f", without quotes: {value}" if right else ""


def suggest(word: str, options: list[str], otherwise: str) -> str:
    """Return "did you mean X?" for the nearest option, or `otherwise` followed by all options."""
    near = difflib.get_close_matches(word.lower(), options, n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else otherwise + ", ".join(options)


def section_at(model: type[BaseModel], place: Place) -> type[BaseModel] | None:
    """Return the model of the section at `place`; None if there is none. A list's index leads to its items' model."""
    kind: Any = model
    for part in place:
        if isinstance(part, int):
            (kind,) = get_args(kind) or (None,)
        else:
            field = kind.model_fields.get(part) if _is_section(kind) else None
            kind = field.annotation if field else None
            kind = next((one for one in get_args(kind) if _is_section(one) and type(None) in get_args(kind)), kind)
    return kind if _is_section(kind) else None


def _is_section(kind: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _shown(value: Any) -> str:
    if value is None:
        return "nothing (null)"
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _dotted(place: Place) -> str:
    return ".".join(map(str, place))
