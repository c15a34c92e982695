"""Functions of scorers and rewards: built in, installed, or in a Python file of the repository."""

import ast
import importlib
import importlib.metadata
import inspect
import signal
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

from flows.errors import StageError
from flows.evaluation.scorers.texts import Score
from flows.params import RewardSum, Scorer
from flows.params.file import suggest
from flows.params.scorers import BUILT_IN, ENTRY_POINTS

MODULES = {
    "exact_match": "flows.evaluation.scorers.texts",
    "regex": "flows.evaluation.scorers.texts",
    "token_f1": "flows.evaluation.scorers.texts",
    "length": "flows.evaluation.scorers.texts",
    "rouge_l": "flows.evaluation.scorers.texts",
    "json_schema": "flows.evaluation.scorers.schema",
    "chrf": "flows.evaluation.scorers.translation",
    "bleu": "flows.evaluation.scorers.translation",
    "code": "flows.evaluation.scorers.program",
    "reward": "flows.evaluation.scorers.reward",
}
"""{built-in scorer: the module with the function of this name that makes it}"""
NEED_ROOT = ("reward",)
"""Built-in scorers that also get the repository, as `root`."""


def load_scorer(scorer: Scorer, root: Path) -> Score:
    """Return the function of an entry, with its options.

    Args:
        scorer: The entry.
        root: The repository.

    Raises:
        StageError: The function is missing, its module cannot be imported, or it does not take the options.
    """
    options = scorer.given_options(root)
    if scorer.scorer in BUILT_IN:
        make = getattr(importlib.import_module(MODULES[scorer.scorer]), scorer.scorer)
        options |= {"root": root} if scorer.scorer in NEED_ROOT else {}
        try:
            return make(**options)
        except (ValueError, TypeError, OSError) as error:
            raise StageError(f"{_entry(scorer)}: {error}") from error
    function = load_function(*scorer.file, root, _entry(scorer)) if scorer.file else _installed(scorer)
    try:
        inspect.signature(function).bind("prompt", "answer", "reference", {}, **options)
    except TypeError as error:
        raise StageError(
            f"{_entry(scorer)}: {scorer.scorer} is called with (prompt, answer, reference, row"
            f"{''.join(f', {name}=...' for name in options)}), which it does not take: {error}"
        ) from error
    return lambda prompt, answer, reference, row: function(prompt, answer, reference, row, **options)


def check_scorers(scorers: Sequence[Scorer], root: Path) -> None:
    """Check, without running code of the repository, that the functions of all entries exist.

    Args:
        scorers: The entries of `evaluate.scorers` and `train.grpo.rewards`.
        root: The repository.

    Raises:
        StageError: A file, a function or a package is missing, or an option of a built-in scorer does not fit.
    """
    for scorer in scorers:
        if isinstance(scorer, RewardSum):
            continue  # its rewards are entries of their own
        if scorer.file is None:
            load_scorer(scorer, root)
            continue
        path, function = scorer.file
        names = _defined(_parsed(_entry(scorer), root / path))
        if function not in names:
            raise _no_function(_entry(scorer), path, function, names)


def _entry(scorer: Scorer) -> str:
    return f"{scorer.section}, {scorer.name}"


def _parsed(entry: str, path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_bytes(), str(path))
    except OSError as error:
        raise StageError(f"{entry}: {path} cannot be read ({error.strerror}); create it and `git add` it") from error
    except (SyntaxError, ValueError) as error:
        raise StageError(f"{entry}: {path} is not valid Python: {error}") from error


def load_function(name: str, function: str, root: Path, entry: str) -> Callable[..., Any]:
    """Return a function of a Python file of the repository.

    Args:
        name: Path of the file, relative to `root`.
        function: Name of the function.
        root: The repository.
        entry: The entry of params.yaml that names the function, for the messages.

    Raises:
        StageError: The file cannot be read or imported, or lacks the function.
    """
    path = root / name
    module = ModuleType(f"peftcore_{path.stem}")
    module.__file__ = str(path)
    # not imported as a module: that would write compiled files into data/, on which stages depend
    program = compile(_parsed(entry, path), str(path), "exec")
    try:
        _without_exit(exec)(program, module.__dict__)
    except Exception as error:
        raise StageError(f"{entry}: {name} fails when it is imported: {type(error).__name__}: {error}") from error
    value = getattr(module, function, None)
    if not callable(value):
        callables = [key for key, one in vars(module).items() if callable(one) and not key.startswith("__")]
        raise _no_function(entry, name, function, callables)
    return _without_exit(value)


def _installed(scorer: Scorer) -> Callable[..., Any]:
    (entry, *_) = importlib.metadata.entry_points(group=ENTRY_POINTS, name=scorer.scorer)
    try:
        return _without_exit(_without_exit(entry.load)())
    except Exception as error:
        raise StageError(
            f"{_entry(scorer)}: the installed scorer {scorer.scorer} ({entry.value}) cannot be loaded: "
            f"{type(error).__name__}: {error}"
        ) from error


def _without_exit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function, which raises RuntimeError where it would end the process by SystemExit."""

    @wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        try:
            return function(*arguments, **options)
        except SystemExit as error:
            if error.code == 128 + signal.SIGTERM:  # SIGTERM, which ends the stage while the function runs
                raise
            raise RuntimeError(f"it ends the process by sys.exit({error.code!r})") from error

    return call


def _no_function(entry: str, path: str, function: str, names: Sequence[str]) -> StageError:
    known = suggest(function, list(names), "it has ") if names else "it has none"
    return StageError(f"{entry}: {path} has no function {function}; {known}")


def _defined(tree: ast.Module) -> list[str]:
    """Return the names that a module defines, assigns or imports at its top."""
    names: list[str] = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names += [alias.asname or alias.name for alias in node.names]
    return names
