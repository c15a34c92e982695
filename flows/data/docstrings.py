"""`stdlib:docstrings`: functions of the running Python's standard library with their docstring's first sentence.

The same on every machine with the same Python, and code that people wrote and reviewed. The task: from the source
without its docstring, write the sentence in the library's house style.
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
"""How many words a usable sentence has."""
_NOT_LIBRARY = {
    *("__pycache__", "site-packages", "dist-packages", "test", "tests"),
    *("idlelib", "lib2to3", "turtledemo"),  # applications, with fixtures that are no code
}
_NOT_PROSE = re.compile(r"--|->|>>>|<==>")
_SENTENCE = re.compile(r"(.+?(?<!\be\.g)(?<!\bi\.e)(?<!\betc)(?<!\bvs)[.!?])(?=\s|$)", re.DOTALL)


@dataclass(frozen=True)
class Pair:
    """A function's source without its docstring, the docstring's first sentence, and where it stands."""

    source: str
    summary: str
    module: str
    line: int


def read(system_prompt: str | None, library: Path | None = None) -> list[Example]:
    """All pairs as examples, in the order of module and line; a group is a module, a slice a top-level package.

    library: the folder to read; None is the running Python's standard library. Raises DataError if it has none.
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
    """What the user's turn asks."""
    return f"{INSTRUCTION}\n\n```python\n{source}\n```"


def pairs(library: Path) -> Iterator[Pair]:
    """Every usable pair below `library`, which is not imported; files that do not parse are skipped."""
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if _NOT_LIBRARY.intersection(relative.parts[:-1]):
            continue
        try:
            text = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
            tree = ast.parse(text)
        except (SyntaxError, UnicodeDecodeError):  # templates and fixtures that are no modules
            continue
        lines = text.split("\n")
        for function in _functions(tree):
            summary, source = first_sentence(ast.get_docstring(function)), without_docstring(function, lines)
            if summary and source:
                yield Pair(source, summary, _module(relative), function.lineno)


def first_sentence(docstring: str | None) -> str | None:
    """The first sentence on one line; None for one that says too little, too much, or is a signature or doctest."""
    if not docstring:
        return None
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    match = _SENTENCE.match(paragraph)
    sentence = match[1] if match else paragraph
    if len(sentence.split()) not in WORDS or not sentence[0].isupper() or _NOT_PROSE.search(sentence):
        return None
    return sentence


def without_docstring(function: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str | None:
    """The function's source, decorators included, dedented and without its docstring.

    lines: of its module. None if nothing but the docstring is in the body, or it shares a line with other code.
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
    kept = lines[first - 1 : docstring.lineno - 1] + body
    indent = " " * function.col_offset
    return "\n".join(line.removeprefix(indent).rstrip() for line in kept)


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Functions and methods, nested ones too, in the order of the source."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
        yield from _functions(node)


def _module(relative: Path) -> str:
    parts = relative.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
