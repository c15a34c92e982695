"""Which functions of a library become examples, and what their prompt holds."""

import ast
from pathlib import Path

import pytest

from flows.data.docstrings import first_sentence, pairs, prompt, read, without_docstring
from flows.errors import DataError

MODULE = '''
class Stack:
    """A stack of things, which is no function."""

    @property
    def size(self):
        """Return how many things there are.  More is said here.

        And here.
        """

        # counted each time
        return len(self.things)

    async def pop(self):
        "Remove the thing on top."
        return self.things.pop()


def outer():
    """Return a function that returns one."""
    def inner():
        """Return the number one, always
        the same."""
        return 1
    return inner


def only_documented():
    """Say what it would do."""


def on_one_line(): """Return nothing at all."""; return None


def undocumented():
    return 1
'''


ONE = "def f(x):\n    'Return the x given.'\n    return x\n"


def library(folder: Path, modules: dict[str, str]) -> Path:
    for name, text in modules.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_functions_methods_and_nested_ones_in_the_order_of_the_source(tmp_path: Path) -> None:
    found = list(pairs(library(tmp_path, {"stack.py": MODULE})))
    assert [pair.summary for pair in found] == [
        "Return how many things there are.",
        "Remove the thing on top.",
        "Return a function that returns one.",
        "Return the number one, always the same.",
    ]


def test_the_source_is_dedented_and_holds_its_decorators_but_not_its_docstring(tmp_path: Path) -> None:
    size, pop, *_ = pairs(library(tmp_path, {"stack.py": MODULE}))
    assert size.source == "@property\ndef size(self):\n    # counted each time\n    return len(self.things)"
    assert pop.source == "async def pop(self):\n    return self.things.pop()"


def test_every_source_of_the_running_python_still_parses_and_has_lost_its_docstring() -> None:
    import json.decoder

    folder = Path(json.decoder.__file__).parent
    found = list(pairs(folder))
    assert len(found) > 8
    for pair in found:
        function = ast.parse(pair.source).body[0]
        assert isinstance(function, ast.FunctionDef)
        assert ast.get_docstring(function) is None


def test_a_module_is_a_group_and_its_package_a_slice(tmp_path: Path) -> None:
    folder = library(tmp_path, {"pack/sub/stack.py": MODULE, "pack/sub/__init__.py": ONE, "alone.py": ONE})
    found = {(example.group, example.slice) for example in read(None, folder)}
    assert found == {("pack.sub.stack", "pack"), ("pack.sub", "pack"), ("alone", "alone")}


def test_tests_caches_and_installed_packages_are_not_the_library(tmp_path: Path) -> None:
    folder = library(
        tmp_path, dict.fromkeys(["test/a.py", "json/tests/b.py", "site-packages/c.py", "idlelib/d.py"], MODULE)
    )
    assert list(pairs(folder)) == []


def test_a_file_that_is_no_module_is_passed_over(tmp_path: Path) -> None:
    folder = library(tmp_path, {"bad.py": "def broken(:\n", "good.py": ONE})
    (folder / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\nx = '\xe9'\n")
    assert [pair.module for pair in pairs(folder)] == ["good"]


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Return the value.\nThen more.", "Return the value."),
        ("Return the value\nof a name", "Return the value of a name"),
        ("Split e.g. on commas. Then more.", "Split e.g. on commas."),
        ("Return version 1.2 of it. More.", "Return version 1.2 of it."),
        ("First paragraph only\n\nSecond one.", "First paragraph only"),
        ("f(x, y) -> the sum of both", None),
        ("S.append(value) -- append the value", None),
        ("self + other is returned", None),
        ("Two words", None),
        ("Word " * 41, None),
        ("", None),
        (None, None),
    ],
)
def test_the_first_sentence(docstring: str | None, sentence: str | None) -> None:
    assert first_sentence(docstring) == sentence


def test_offsets_are_bytes_so_other_alphabets_do_not_hide_code() -> None:
    text: str = 'def f(x): "Größe, äöü, des x."; return x\n'
    function = ast.parse(text).body[0]
    assert isinstance(function, ast.FunctionDef)
    assert without_docstring(function, list(text.split("\n"))) is None


def test_the_chat_asks_with_the_source_and_answers_with_the_sentence(tmp_path: Path) -> None:
    example = read("Be brief.", library(tmp_path, {"m.py": ONE}))[0]
    assert example.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": prompt("def f(x):\n    return x")},
        {"role": "assistant", "content": "Return the x given."},
    ]
    assert example.where == "m:1"


def test_a_python_without_sources_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no Python sources"):
        read(None, tmp_path)
