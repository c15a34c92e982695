"""The names of `peftcore` itself: one explicit list that editors resolve, imported at their first use."""

import ast
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import peftcore
from peftcore.registry import methods

SOURCE = Path(peftcore.__file__)

MOVED = {
    "Architecture": "detection",
    "Average": "composition",
    "Fusion": "routing",
    "Gate": "composition",
    "Only": "composition",
    "Parallel": "composition",
    "Recipe": "merging",
    "Split": "composition",
    "Stack": "composition",
    "Weighted": "composition",
    "detect": "detection",
}


def names_for_type_checkers() -> dict[str, str]:
    """Return {name: module} of the imports below `if TYPE_CHECKING:`."""
    blocks = [node for node in ast.parse(SOURCE.read_text()).body if isinstance(node, ast.If)]
    assert len(blocks) == 1
    imports = [node for node in blocks[0].body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in imports for alias in node.names}


def test_the_list_the_table_and_the_types_name_the_same() -> None:
    assert names_for_type_checkers() == peftcore._MODULES
    assert sorted(peftcore.__all__) == sorted(peftcore._MODULES)
    assert set(peftcore.__all__) < set(dir(peftcore))


def test_each_name_is_an_attribute_of_its_module() -> None:
    for name in peftcore.__all__:
        assert getattr(peftcore, name) is getattr(import_module(peftcore._MODULES[name]), name), name


def test_every_builtin_configuration_is_in_the_list() -> None:
    configs = {m.config.__name__ for m in methods().values() if m.config.__module__.startswith("peftcore.")}
    assert len(configs) >= 30
    assert configs <= set(peftcore.__all__), "add it to the list, the table and the type block of peftcore/__init__.py"


@pytest.mark.parametrize(("name", "module"), MOVED.items())
def test_a_moved_name_still_works_and_says_where_it_is(name: str, module: str) -> None:
    assert name not in peftcore.__all__
    with pytest.warns(DeprecationWarning, match=f"from peftcore.{module} import {name}"):
        old = getattr(peftcore, name)
    assert old is getattr(import_module(f"peftcore.{module}"), name)


def test_an_import_of_a_moved_name_warns_at_the_callers_line() -> None:
    with pytest.warns(DeprecationWarning) as warnings:
        exec(compile("from peftcore import Only", "user.py", "exec"), {})
    assert {warning.filename for warning in warnings} == {"user.py"}


def test_importing_the_package_imports_nothing_else() -> None:
    code = (
        "import collections, importlib, sys, typing, warnings; before = set(sys.modules);"
        "import peftcore; peftcore.__version__; peftcore.__all__;"
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["peftcore"]


@pytest.mark.slow
def test_a_type_checker_resolves_every_name(tmp_path: Path) -> None:
    """No name may be `Any` by way of the module's `__getattr__`, which serves third-party configurations."""
    names = ", ".join(peftcore.__all__)
    script = tmp_path / "user.py"
    script.write_text(
        f"from peftcore import {names}\n" + "".join(f"reveal_type({name})\n" for name in peftcore.__all__)
    )
    config = {"include": [str(script)], "extraPaths": [str(SOURCE.parents[1])], "typeCheckingMode": "standard"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
    done = subprocess.run([*command, "--project", str(tmp_path)], capture_output=True, text=True, check=False)
    told = json.loads(done.stdout)["generalDiagnostics"]
    assert [one["message"] for one in told if one["severity"] == "error"] == []
    types = {one["message"].split('"')[1]: one["message"].split('"')[3] for one in told}
    assert set(types) == set(peftcore.__all__)
    assert types["IA3Config"] == "type[IA3Config]"
    assert [name for name, type_ in types.items() if type_ in ("Any", "Unknown")] == []
