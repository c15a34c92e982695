"""`stdlib:docstrings`: functions of the running Python's standard library with their docstring's first sentence.

The data are identical on every machine with the same Python, and the code is written and reviewed by people. The task:
write the docstring's first sentence, given the source without the docstring.
"""

import ast
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flows.data.examples import Example, question_and_answer
from flows.errors import DataError

INSTRUCTION = "Summarise this function in one sentence, as its docstring begins."
WORDS = range(3, 41)
"""Number of words of a usable sentence."""
_NOT_LIBRARY = {
    *("__pycache__", "site-packages", "dist-packages", "test", "tests"),
    *("idlelib", "lib2to3", "turtledemo"),  # applications, with fixtures that are not code
}
_NOT_PROSE = re.compile(r"--|->|>>>|<==>")
_SENTENCE = re.compile(r"(.+?(?<!\be\.g)(?<!\bi\.e)(?<!\betc)(?<!\bvs)[.!?])(?=\s|$)", re.DOTALL)


@dataclass(frozen=True)
class Pair:
    """A function's source without its docstring, the docstring's first sentence, and the source's location."""

    source: str
    summary: str
    module: str
    line: int


_BLOCKS = ("body", "handlers", "cases", "orelse", "finalbody")
"""Fields of a node that hold statements, in source order."""


def read(system_prompt: str | None, library: Path | None = None) -> list[Example]:
    """Return all pairs as examples, ordered by module and line.

    An example's group is its module, and its slice is the top-level package.

    Args:
        system_prompt: System prompt of every example; None for no system turn.
        library: The folder to read; None: the running Python's standard library.

    Raises:
        DataError: The folder has no sources with docstrings.
    """
    folder = library or Path(sysconfig.get_paths()["stdlib"])
    examples = [
        Example(
            question_and_answer(prompt(pair.source), pair.summary, system_prompt),
            group=pair.module,
            slice=pair.module.partition(".")[0],
            where=f"{pair.module}:{pair.line}",
        )
        for pair in pairs(folder)
    ]
    if not examples:
        raise DataError(
            f"{folder} holds no Python sources with docstrings; this Python ships without them, so give data.source "
            "a file of your own or run with another Python"
        )
    return examples


def prompt(source: str) -> str:
    """Return the user's turn for a function's source."""
    return f"{INSTRUCTION}\n\n```python\n{source}\n```"


def pairs(library: Path) -> Iterator[Pair]:
    """Yield each usable pair below `library`. No file is imported; files that do not parse are skipped."""
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if _NOT_LIBRARY.intersection(relative.parts[:-1]):
            continue
        try:
            text = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
            tree = ast.parse(text)
        except (SyntaxError, UnicodeDecodeError):  # templates and fixtures
            continue
        lines = text.split("\n")
        for function in _functions(tree):
            summary, source = first_sentence(ast.get_docstring(function)), without_docstring(function, lines)
            if summary and source:
                yield Pair(source, summary, _module(relative), function.lineno)


def first_sentence(docstring: str | None) -> str | None:
    """Return the first sentence on one line; None if it is too short, too long, a signature or a doctest."""
    if not docstring:
        return None
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    match = _SENTENCE.match(paragraph)
    sentence = match[1] if match else paragraph
    if len(sentence.split()) not in WORDS or not sentence[0].isupper() or _NOT_PROSE.search(sentence):
        return None
    return sentence


def without_docstring(function: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str | None:
    """Return the function's source, decorators included, dedented and without its docstring.

    lines: of its module. Returns None if the body is only a docstring, or the docstring shares a line with code.
    """
    docstring, rest = function.body[0], function.body[1:]
    first = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])
    last, end = function.end_lineno, docstring.end_lineno
    if not rest or last is None or end is None:
        return None
    before = lines[docstring.lineno - 1].encode()[: docstring.col_offset]
    after = lines[end - 1].encode()[docstring.end_col_offset :].split(b"#")[0]
    if before.strip() or after.strip():
        return None
    body = lines[end:last]
    while body and not body[0].strip():
        body = body[1:]
    rest_lines = lines[first - 1 : docstring.lineno - 1] + body
    indent = " " * function.col_offset
    return "\n".join(line.removeprefix(indent).rstrip() for line in rest_lines)


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield functions and methods, nested ones too, in source order."""
    for name in _BLOCKS:
        for node in getattr(tree, name, ()):  # not expressions, which are most of the nodes and hold none
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node
            yield from _functions(node)


def _module(relative: Path) -> str:
    parts = relative.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
