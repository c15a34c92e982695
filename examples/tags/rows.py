"""Write data/references.jsonl: words of docstrings, tagged by what their markup says: code, a class, or a function."""

import ast
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("networkx", "numpy", "pydantic", "torch", "transformers")
"""Installed packages whose docstrings have such markup."""
LEAVE_OUT = {"test", "tests", "testing", "__pycache__"}
PER_PACKAGE = 600
"""Sentences of a package at most, so that no package outweighs the others."""
MARKUP = re.compile(r":(?P<role>class|func|meth):`~?(?P<name>[\w.]+)`|``(?P<code>[^`\n]{2,40})``")
LIKELY = re.compile(rb":(class|func|meth):`|(?<!`)``(?!`)")
"""What a file with such markup contains; the others need not be parsed, which takes most of the time."""
TYPES = {"class": "CLASS", "func": "FUNCTION", "meth": "FUNCTION"}


def sentences(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield (module, sentence) of the docstrings below a folder."""
    for path in sorted(folder.rglob("*.py")):
        if LEAVE_OUT.intersection(path.relative_to(folder).parts[:-1]):
            continue
        source = path.read_bytes()
        if not LIKELY.search(source):
            continue
        try:
            tree = ast.parse(source)
        except SyntaxError:  # templates of code
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                for paragraph in re.split(r"\n\s*\n", text):
                    for sentence in re.split(r"(?<=[.])\s+(?=[A-Z])", " ".join(paragraph.split())):
                        yield str(path.relative_to(folder.parent).with_suffix("")).replace("/", "."), sentence


def tagged(sentence: str) -> tuple[list[str], list[str]] | None:
    """Return the words without their markup, and their tags; None for a sentence without such markup."""
    words: list[str] = []
    tags: list[str] = []
    end = 0
    for found in [*MARKUP.finditer(sentence), None]:
        plain = sentence[end : found.start() if found else None].split()
        words += plain
        tags += ["O"] * len(plain)
        if found is None:
            break
        kind = TYPES.get(found["role"] or "", "CODE")
        names = (found["code"] or found["name"].rpartition(".")[2]).split()
        words += names
        tags += [f"{'I' if number else 'B'}-{kind}" for number in range(len(names))]
        end = found.end()
    whole = 6 <= len(words) <= 40 and not any("`" in word or ">>>" in word for word in words)
    return (words, tags) if whole and set(tags) != {"O"} else None


rows: dict[str, dict[str, object]] = {}
for package in PACKAGES:
    found = 0
    spec = importlib.util.find_spec(package)
    assert spec is not None, f"{package} is not installed"
    for module, sentence in sentences(Path(str(spec.origin)).parent):
        if found == PER_PACKAGE:
            break
        if (pair := tagged(sentence)) and " ".join(pair[0]) not in rows:
            rows[" ".join(pair[0])] = {"tokens": pair[0], "tags": pair[1], "module": module, "package": package}
            found += 1
out = Path(__file__).parent / "data" / "references.jsonl"
out.parent.mkdir(exist_ok=True)
out.write_text("".join(json.dumps(row) + "\n" for row in rows.values()), encoding="utf-8")
print(f"{out}: {len(rows)} sentences")
