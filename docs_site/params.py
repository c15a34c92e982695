"""The page of `params.yaml`: values by its JSON schema, defaults and meanings by the commented file."""

import re
from collections.abc import Iterator
from typing import Any

from docs_site.links import ROOT
from flows.params.params import Params

ENTRY = re.compile(r"^( *)(\w+):(?: +((?:[^#\s]|\S#|(?<=\S) +(?=[^#\s]))+))? *(?:# (.*))?$")
SECTION = "the keys below"
CONTINUED = re.compile(r"^ +# (.*)$")


def params_page() -> str:
    """Return the Markdown of the page."""
    schema = Params.model_json_schema()
    entries = read_entries((ROOT / "params.yaml").read_text(encoding="utf-8"))
    parts = [
        "# params.yaml\n",
        "Every option of the pipeline. Shares are fractions of 1. A changed value reruns only the stages that read it. "
        "The defaults are those of this repository's `params.yaml`; `peftcore init` writes "
        "[other values](../pipeline.md#a-project-of-your-own) for your own data. `.peftcore/params.schema.json` of a "
        "project has the same as a JSON schema, for editors.\n",
    ]
    for section, value in schema["properties"].items():
        fields = list(_fields(schema, value, section))
        parts += [f"## {section}\n", "| key | values | default | meaning |", "|---|---|---|---|"]
        for key, allowed in fields:
            default, meaning = entries.get(key, ("", ""))
            if allowed != SECTION:
                parts.append(f"| `{key}` | {allowed} | `{default}` | {_cell(meaning)} |")
            elif meaning:
                parts.append(f"| `{key}` | {SECTION} | | {_cell(meaning)} |")
        parts.append("")
    return "\n".join(parts)


def read_entries(text: str) -> dict[str, tuple[str, str]]:
    """Return {full key: (default, comment)} of a commented YAML file; a comment may go on in the lines below."""
    entries: dict[str, tuple[str, str]] = {}
    path: list[tuple[int, str]] = []
    last = ""
    for line in text.splitlines():
        if continued := CONTINUED.match(line):
            default, meaning = entries[last]
            entries[last] = (default, f"{meaning} {continued[1]}".strip())
        elif entry := ENTRY.match(line):
            indent, name, default, meaning = entry.groups()
            path = [above for above in path if above[0] < len(indent)] + [(len(indent), name)]
            last = ".".join(part for _, part in path)
            entries[last] = (default or "", meaning or "")
    return entries


def _fields(schema: dict[str, Any], value: dict[str, Any], key: str) -> Iterator[tuple[str, str]]:
    """Yield (full key, allowed values) of a section and of the sections in it."""
    section = _resolved(schema, value)
    for name, field in section["properties"].items():
        inner = _resolved(schema, field)
        full = f"{key}.{name}"
        if "properties" in inner:
            yield full, SECTION
            yield from _fields(schema, field, full)
        else:
            yield full, _allowed(schema, field)


def _resolved(schema: dict[str, Any], value: dict[str, Any]) -> dict[str, Any]:
    reference = value.get("$ref") or next((one["$ref"] for one in value.get("allOf", []) if "$ref" in one), None)
    return schema["$defs"][reference.rpartition("/")[2]] if reference else value


def _allowed(schema: dict[str, Any], field: dict[str, Any]) -> str:
    field = _resolved(schema, field)
    for several in ("anyOf", "oneOf"):
        if several in field:
            return " or ".join(dict.fromkeys(_allowed(schema, one) for one in field[several]))
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    names = {"array": "list", "boolean": "`true`, `false`", "integer": "whole number", "object": "mapping"}
    names |= {"null": "`null`", "string": "text"}
    text = names.get(field.get("type", ""), field.get("type", "any"))
    limits = {"minimum": "≥", "maximum": "≤", "exclusiveMinimum": ">", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {field[name]:,}" for name, sign in limits.items() if name in field]
    return f"{text} {', '.join(bounds)}".strip()


def _cell(text: str) -> str:
    return text.replace("|", "&#124;").replace("*", r"\*")
