"""Text files are read and written in UTF-8, whatever the locale: an encoding is named wherever one is opened."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BINARY = ("os", "archive", "Image")
"""Names whose `open` opens no text file."""


def without_encoding(source: str) -> Iterator[str]:
    """Yield the calls that open a text file in the encoding of the locale."""
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call) or any(keyword.arg == "encoding" for keyword in call.keywords):
            continue
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        owner = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ""
        values = [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
        modes = [one.value for one in values if isinstance(one, ast.Constant) and isinstance(one.value, str)]
        if (
            (name == "read_text" and not call.args)
            or (name == "write_text" and len(call.args) == 1)
            or (name == "open" and owner not in BINARY and not any("b" in mode and len(mode) < 4 for mode in modes))
        ):
            yield f"line {call.lineno}: {ast.unparse(call)}"


@pytest.mark.parametrize("folder", ["benchmarks", "docs_site", "examples", "flows", "peftcore"])
def test_text_files_are_opened_with_an_encoding(folder: str) -> None:
    named = [
        f"{file.relative_to(ROOT)} {call}"
        for file in sorted((ROOT / folder).rglob("*.py"))
        for call in without_encoding(file.read_text(encoding="utf-8"))
    ]
    assert not named, "\n".join(named)
