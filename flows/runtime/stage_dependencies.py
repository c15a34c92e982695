"""Source files that each stage of dvc.yaml imports, so that a changed file reruns only the stages that use it.

    python -m flows.runtime.stage_dependencies [--write]

compares dvc.yaml with the imports, and with --write updates dvc.yaml. Imports are read from the syntax trees; no module
is imported. Code that is installed outside of the project is no dependency of its stages.
"""

import argparse
import ast
import importlib.util
import re
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from ruamel.yaml import YAML

from flows.errors import RepositoryError
from flows.runtime.project import find_root

PACKAGES = ("flows", "peftcore")

IGNORED = {
    "flows.base.hub": "downloads what base.source and data.source identify",
    "flows.errors": "error messages",
    "flows.params": "reads params.yaml, whose values are dependencies themselves",
    "flows.paths": "names of outputs, which dvc.yaml lists",
    "flows.runtime.logs": "logging",
    "flows.runtime.processes": "starts and ends processes",
    "flows.runtime.progress": "progress bars",
    "flows.runtime.stage": "starts a stage and reports its errors",
    "flows.runtime.tracking": "mirrors a run to W&B, MLflow and TensorBoard",
    "flows.webhooks": "sends events",
    "flows.stages": "sets environment variables",
    "peftcore": "table of public names",
    "peftcore.errors": "error messages",
    "peftcore.files": "atomic writes and digests",
}
"""{module that cannot change a stage's outputs: reason}. An entry of a package covers its modules, those of `_ALONE`
apart."""
_ALONE = ("flows.stages", "peftcore")
COUNTED = ("flows.params.method_fields",)
"""Modules of ignored packages that can change outputs."""


def imported_modules(module: str) -> set[str]:
    """Return the modules whose code can change the results of `module`, itself included.

    Modules in `IGNORED` are left out, and so are the modules that only they import.
    """
    todo, modules = [module], set[str]()
    while todo:
        name = todo.pop()
        if name not in modules and not _is_ignored(name):
            modules.add(name)
            todo += _imports(name)
    return modules


def module_files(module: str) -> dict[str, Path]:
    """Return {module: its file} of `imported_modules`."""
    return {name: _file(name) for name in imported_modules(module)}


def code_dependencies(root: Path, module: str) -> list[str]:
    """Return the files and folders below `root` that `module` depends on, as sorted relative paths.

    A folder stands for its modules if all of them are used. C sources beside a module that names them count too.
    """
    files = set(module_files(module).values())
    paths = {path for path in files if path.is_relative_to(root) and _has_code(path)}
    paths |= {
        source for path in paths for source in path.parent.glob("*.[ch]") if source.name in path.read_text("utf-8")
    }
    folders = {parent for path in paths for parent in path.parents if parent.is_relative_to(root)} - {root}
    for folder in sorted(folders, key=lambda folder: len(folder.parts)):
        if all(file in files or not _has_code(file) for file in folder.rglob("*.py")) and paths.isdisjoint(
            folder.parents
        ):
            paths = {path for path in paths if folder not in path.parents} | {folder}
    return sorted(path.relative_to(root).as_posix() for path in paths)


def module_of(stage: Mapping[str, Any]) -> str | None:
    """Return the module that a stage of dvc.yaml runs; None if it runs no module of `flows`."""
    found = re.search(r"python -m (flows\.[\w.]+)", str(stage.get("cmd")))
    return None if found is None else found[1]


def is_module(name: str) -> bool:
    """Return True if the installed packages have a module of this name."""
    return _path(name) is not None


def updated(root: Path, stage: dict[str, Any]) -> list[str] | None:
    """Return all dependencies of a stage of dvc.yaml, with its code's; None if the stage runs no module of `flows`."""
    module = module_of(stage)
    if module is None:
        return None
    deps = [str(dep) for dep in stage.get("deps", [])]
    is_code = [dep.partition("/")[0] in PACKAGES for dep in deps]
    first = is_code.index(True) if True in is_code else len(deps)
    others = [dep for dep, code in zip(deps, is_code, strict=True) if not code]
    return [*others[:first], *code_dependencies(root, module), *others[first:]]


def main() -> None:
    """Compare or update dvc.yaml; exit status 1 if it differs and was not updated."""
    parser = argparse.ArgumentParser(description="Compare the code dependencies in dvc.yaml with the stages' imports.")
    parser.add_argument("--write", action="store_true", help="update dvc.yaml")
    write = parser.parse_args().write
    try:
        root = find_root()
    except RepositoryError as error:
        sys.exit(f"error: {error}")
    yaml = YAML()
    yaml.width, yaml.preserve_quotes = 120, True
    yaml.indent(mapping=2, sequence=4, offset=2)
    pipeline = yaml.load(root / "dvc.yaml")
    changed = []
    for name, stage in pipeline["stages"].items():
        deps = updated(root, stage)
        if deps is not None and deps != list(stage.get("deps", [])):
            changed.append(name)
            stage["deps"] = deps
    if changed and write:
        yaml.dump(pipeline, root / "dvc.yaml")
    elif changed:
        sys.exit(f"error: dependencies of {', '.join(changed)} differ from the imports; run this with --write")


def _is_ignored(module: str) -> bool:
    if module in COUNTED:
        return False
    return module in IGNORED or any(module.startswith(f"{name}.") for name in IGNORED if name not in _ALONE)


@cache
def _file(module: str) -> Path:
    path = _path(module)
    assert path is not None, module
    return path


@cache
def _path(module: str) -> Path | None:
    """Return the file of a module of `PACKAGES`; None if there is no such module."""
    top, *names = module.split(".")
    spec = importlib.util.find_spec(top) if top in PACKAGES else None
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).resolve().parent.joinpath(*names)
    candidates = (path / "__init__.py", path.with_suffix(".py"))
    return next((file for file in candidates if file.is_file()), None)


def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _has_code(file: Path) -> bool:
    """Return False for a file with a docstring alone."""
    tree = _tree(file)
    return bool(tree.body[1:] if ast.get_docstring(tree) is not None else tree.body)


@cache
def _imports(module: str) -> frozenset[str]:
    """Return the modules that `module` imports, at its top or inside of functions, and those that it names in text."""
    names = set[str]()
    for node in _statements(module).executed:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None and _path(node.module) is not None:
            names |= {_home(node.module, alias.name) for alias in node.names} | {node.module}
        elif isinstance(node, str) and "." in node and _path(node):
            names |= _whole(node)  # a package that is scanned, or a module that a process runs
    names = {name for name in names if _path(name) is not None}
    parents = {".".join(parts[:end]) for parts in (name.split(".") for name in names) for end in range(1, len(parts))}
    return frozenset((names | parents) - {module})


class _Statements(NamedTuple):
    executed: list[ast.Import | ast.ImportFrom | str]
    """Imports and strings, wherever they stand."""
    type_checked: list[ast.ImportFrom]
    """Imports at the module's top for type checkers alone."""


@cache
def _statements(module: str) -> _Statements:
    """Parse a module. The tree is not kept: those of all modules take seconds to delete when the process ends."""
    tree = _tree(_file(module))
    executed: list[ast.Import | ast.ImportFrom | str] = []
    for node in _nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            executed.append(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            executed.append(node.value)
    checked = [node for branch in tree.body if _is_for_type_checkers(branch) for node in branch.body]
    return _Statements(executed, [node for node in checked if isinstance(node, ast.ImportFrom)])


def _nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Walk a syntax tree without the bodies of `if TYPE_CHECKING:`."""
    todo = [tree]
    while todo:
        node = todo.pop()
        yield node
        if _is_for_type_checkers(node):
            todo += node.orelse
        else:
            todo += ast.iter_child_nodes(node)


def _is_for_type_checkers(node: ast.AST) -> TypeGuard[ast.If]:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _home(package: str, name: str) -> str:
    """Return the module that defines a name of a package; a package that imports it itself stands for the name."""
    if _path(f"{package}.{name}") is not None:
        return f"{package}.{name}"
    return _public_names(package).get(name, package)


@cache
def _public_names(package: str) -> dict[str, str]:
    """Return {name: module} of the names that a package imports for type checkers alone, and loads on first use."""
    froms = [node for node in _statements(package).type_checked if node.module is not None]
    return {alias.name: str(node.module) for node in froms for alias in node.names}


def _whole(module: str) -> set[str]:
    """Return a module, or all modules of a package."""
    if module in IGNORED or _file(module).name != "__init__.py":
        return {module}
    folder = _file(module).parent
    inner = [file.relative_to(folder).with_suffix("").parts for file in folder.rglob("*.py")]
    return {".".join([module, *(part for part in parts if part != "__init__")]) for parts in inner}


if __name__ == "__main__":
    main()
