"""Names of functions and classes in installed Python code, and the words that they consist of."""

import ast
import re
import sysconfig
from pathlib import Path

LEAVE_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
PARTS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
"""A word of a name: `XML`, `Parser`, `parser` or `2`."""


def names() -> list[tuple[str, str]]:
    """Return (name, its words in lower case) of the standard library, sorted, each once."""
    found: set[str] = set()
    folder = Path(sysconfig.get_paths()["stdlib"])
    for path in folder.rglob("*.py"):
        if LEAVE_OUT.intersection(path.relative_to(folder).parts[:-1]):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:  # templates of code
            continue
        found |= {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    pairs = [(name, " ".join(PARTS.findall(name)).lower()) for name in sorted(found)]
    return [(name, words) for name, words in pairs if len(words.split()) > 1 and len(name) <= 24]
