"""Write data/errors.jsonl: messages of exceptions in installed Python code, each labelled with its exception's type."""

import ast
import importlib.util
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

LABELS = ("ValueError", "TypeError", "RuntimeError", "NotImplementedError")
PACKAGES = ("networkx", "numpy", "pydantic")
"""Installed packages whose code is read beside the standard library."""
LEAVE_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}


def messages(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield (message, type) of each `raise TYPE("message ...")` below a folder; values in a message become `...`."""
    for path in sorted(folder.rglob("*.py")):
        if LEAVE_OUT.intersection(path.relative_to(folder).parts[:-1]):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:  # templates of code
            continue
        for node in ast.walk(tree):
            match node:
                case ast.Raise(exc=ast.Call(func=ast.Name(id=label), args=[message, *_])) if label in LABELS:
                    if text := text_of(message):
                        yield text, label


def text_of(message: ast.expr) -> str | None:
    """Return the text of a literal, an f-string or `"..." % values`; None for anything else or fewer than 3 words."""
    match message:
        case ast.Constant(value=str(text)) | ast.BinOp(left=ast.Constant(value=str(text)), op=ast.Mod()):
            pass
        case ast.JoinedStr(values=parts):
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in parts)
        case _:
            return None
    text = " ".join(text.split())
    return text if len(text.split()) >= 3 else None


folders = [Path(sysconfig.get_paths()["stdlib"])]
folders += [Path(str(importlib.util.find_spec(package).origin)).parent for package in PACKAGES]
labels: dict[str, set[str]] = {}
for folder in folders:
    for text, label in messages(folder):
        labels.setdefault(text, set()).add(label)
# a message that stands with two types cannot be classified
rows = [{"text": text, "label": label} for text, (label, *others) in labels.items() if not others]
out = Path(__file__).parent / "data" / "errors.jsonl"
out.parent.mkdir(exist_ok=True)
out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
print(f"{out}: {len(rows)} messages")
