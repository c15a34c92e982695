"""One process of `benchmarks.hf_peft_tests`: a file of HF PEFT's tests with one of the two libraries.

    python -m benchmarks.hf_peft_tests_side LIBRARY TEST_FILE RESULTS.jsonl

LIBRARY is `peft` (the installed HF PEFT) or `peftcore` (through `peftcore.as_peft`). Each finished test appends a line
to RESULTS.jsonl. Tests that have a line already are not run again.
"""

import argparse
import ast
import contextlib
import functools
import importlib
import json
import os
import re
import sys
import types
import zlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pytest

# -- names that only tests import ------------------------------------------------------------------------------------


class NotInPeftcore(Exception):
    """A test uses something that peftcore does not have: a private name of HF PEFT."""


@functools.cache
def stand_in(name: str) -> type:
    """Return a class for a name that peftcore lacks, so that a module of tests can be imported.

    Objects of it can be made, because the lists of test cases hold them. Everything else raises NotInPeftcore.
    """

    class StandIn(type):
        def __getattr__(cls, attribute: str) -> Any:
            if attribute.startswith("_"):
                raise AttributeError(attribute)
            raise NotInPeftcore(f"{name} is not in peftcore (its {attribute} was read)")

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        vars(self).update(kwargs)

    def __getattr__(self: Any, attribute: str) -> Any:
        if attribute.startswith("_"):
            raise AttributeError(attribute)
        raise NotInPeftcore(f"{name} is not in peftcore (its {attribute} was read)")

    return StandIn(name, (), {"__init__": __init__, "__getattr__": __getattr__, "is_stand_in": True})


def imports_of(file: Path) -> Iterator[tuple[str, str | None]]:
    """Yield (module, name) of each import from `peft` in a file; the name is None for `import peft.x`."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "peft":
            yield from ((str(node.module), alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names if alias.name.split(".")[0] == "peft")


def add_missing_names(file: Path) -> None:
    """Give the alias `peft` each name that a file of tests imports."""
    import peft

    for source in (file, *file.parent.glob("testing_*.py"), *file.parent.glob("conftest.py")):
        for module_name, name in imports_of(source):
            module = _module(module_name)
            if name is None or (not hasattr(module, name) and _submodule(module_name, name) is not None):
                continue
            value = getattr(module, name, VALUES.get(name) or getattr(peft, name, None))
            setattr(module, name, stand_in(name) if value is None else value)


def _module(name: str) -> types.ModuleType:
    """Return a module of the alias, an empty one if peftcore does not have it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        module = sys.modules[name] = types.ModuleType(name)
        module.__path__ = []
        parent, _, last = name.rpartition(".")
        setattr(_module(parent), last, module)
        return module


def _submodule(module: str, name: str) -> types.ModuleType | None:
    try:
        return importlib.import_module(f"{module}.{name}")
    except ModuleNotFoundError:
        return None


def _get_submodules(model: Any, key: str) -> tuple[Any, Any, str]:
    """Return parent, module and last name of a dotted name."""
    parent, _, last = key.rpartition(".")
    return model.get_submodule(parent), model.get_submodule(key), last


VALUES: dict[str, Any] = {
    "_get_submodules": _get_submodules,
    "is_transformers_ge_v5_1_0": True,
    "is_transformers_ge_v5_6_0": True,
    "is_transformers_ge_v5_13_0": True,
    "DUMMY_MODEL_CONFIG": {"model_type": "custom"},
    "MIN_TARGET_MODULES_FOR_OPTIMIZATION": 20,
    "TRANSFORMERS_MODELS_TO_DELORA_TARGET_MODULES_MAPPING": {"": []},
    "PEFT_TYPE_TO_PREFIX_MAPPING": {"LORA": "lora_"},
}
"""Names that must have a value of their kind while the tests are collected."""


def stay_offline() -> None:
    """Refuse every request to the hub at once; the tests switch HF_HUB_OFFLINE off, and then wait for retries."""
    from huggingface_hub import constants

    constants.is_offline_mode = lambda: True


class Wording:
    """`pytest.raises` and `pytest.warns` that accept any wording, and say where the wording is not as expected.

    The words of errors and warnings are each library's own. Types and numbers of them are compared as the tests say.
    """

    def __init__(self) -> None:
        self.differs = False

    def install(self) -> None:
        pytest.raises = self._accepting(pytest.raises, lambda seen: [str(seen.value)])
        pytest.warns = self._accepting(pytest.warns, lambda seen: [str(one.message) for one in seen])

    def install_everywhere(self) -> None:
        """Accept any wording also where a test compares the text of an error or of a recorded warning by itself.

        The types of errors, and the number of warnings, are compared as the test says.
        """
        from peftcore.errors import PeftError

        def text(value: Any) -> AnyWording:
            return AnyWording(value, self)

        def recorded(recorder: Any) -> list[Any]:
            for warning in recorder._list:
                if issubclass(warning.category, UserWarning | RuntimeWarning) and warning.message.args:
                    warning.message.args = (text(warning.message.args[0]),)
            return recorder._list

        pytest.ExceptionInfo.__str__ = lambda info: text(repr(info))  # type: ignore[method-assign]
        PeftError.__str__ = lambda error: text(super(PeftError, error).__str__())  # type: ignore[method-assign]
        pytest.WarningsRecorder.list = property(recorded)  # type: ignore[assignment]
        pytest.WarningsRecorder.__iter__ = lambda recorder: iter(recorded(recorder))  # type: ignore[method-assign]

    def _accepting(self, function: Any, texts: Callable[[Any], list[str]]) -> Any:
        @contextlib.contextmanager
        def within(*args: Any, match: Any, **kwargs: Any) -> Iterator[Any]:
            with function(*args, **kwargs) as seen:
                yield seen
            self.differs |= not any(re.search(match, text) for text in texts(seen))

        def call(*args: Any, match: Any = None, **kwargs: Any) -> Any:
            return function(*args, **kwargs) if match is None else within(*args, match=match, **kwargs)

        return call


class AnyWording(str):
    """A message that contains any text, and starts with any text, and notes where it does not really."""

    wording: Wording

    def __new__(cls, value: Any, wording: Wording) -> "AnyWording":
        text = super().__new__(cls, value)
        text.wording = wording
        return text

    def __str__(self) -> str:
        return self  # str(text) of a plain subclass would be a plain string

    def __contains__(self, part: Any) -> bool:
        return self._accepted(super().__contains__(part))

    def startswith(self, *arguments: Any) -> bool:
        return self._accepted(super().startswith(*arguments))

    def _accepted(self, same: bool) -> bool:
        self.wording.differs |= not same
        return True


def compares_words(line: dict[str, Any], fixtures: Collection[str]) -> bool:
    """Return True if a test failed where it compares the text of an error or of a recorded warning by itself."""
    if line.get("type") != "AssertionError":
        return False
    searches_text = re.match(r"assert (['\"]).*\1 in (['\"])", line["message"])
    return bool(searches_text) or "ExceptionInfo" in line["message"] or "recwarn" in fixtures


# -- results ---------------------------------------------------------------------------------------------------------


class Recorder:
    """Plugin of pytest that writes each test's outcome as a line of JSON.

    Args:
        results: file to which lines are appended.
        sample: run one test in `sample`, chosen by a checksum of its id.
        wording: says whether a message of the running test has other words.
        again: run only the tests that failed where they compare words, and write only those that pass now.
    """

    def __init__(self, results: Path, sample: int, wording: Wording, again: bool = False):
        self.results, self.sample, self.wording, self.again = results, sample, wording, again
        self.lines = {line["id"]: line for line in read(results) if "id" in line}
        self.of, self.finished = 0, 0
        self.failure: dict[str, Any] | None = None
        self.outcome, self.seconds = "passed", 0.0

    def write(self, line: dict[str, Any]) -> None:
        with self.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def progress(self, test: str) -> None:
        progress = {"id": test, "finished": self.finished, "of": self.of}
        self.results.with_suffix(".running").write_text(json.dumps(progress), encoding="utf-8")

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        chosen = [item for item in items if zlib.crc32(item.nodeid.encode()) % self.sample == 0]
        if self.again:
            chosen = [i for i in chosen if compares_words(self.lines.get(i.nodeid, {}), getattr(i, "fixturenames", ()))]
            items[:] = chosen
        else:
            self.write({"collected": len(items)})
            items[:] = [item for item in chosen if item.nodeid not in self.lines]
        self.of, self.finished = len(chosen), len(chosen) - len(items)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.write({"collection_error": str(report.longrepr)[-2000:]})

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.progress(nodeid)
        self.failure, self.outcome, self.seconds = None, "passed", 0.0
        self.wording.differs = False

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
        outcome: Any = yield
        report: pytest.TestReport = outcome.get_result()
        self.seconds += report.duration
        if report.failed:
            self.outcome = "failed"
            if call.excinfo is not None and self.failure is None:
                self.failure = cause(call.excinfo)
        elif report.skipped and self.outcome == "passed":
            self.outcome = "skipped"

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.finished += 1
        wording = {"other_wording": True} if self.wording.differs else {}
        line = {"id": nodeid, "outcome": self.outcome, "seconds": round(self.seconds, 2)}
        if not self.again or self.outcome == "passed":
            self.write(line | wording | (self.failure or {}))


def cause(info: pytest.ExceptionInfo[BaseException]) -> dict[str, Any]:
    """Return type and message of an exception, where it was raised, and the line of the test."""
    frames = [f"{_short(entry.path)}:{entry.lineno + 1} {entry.name}" for entry in info.traceback]
    test = [frame for frame in frames if frame.startswith("test")]
    return {
        "type": info.typename,
        "message": str(info.value)[:400],
        "raised": frames[-1] if frames else "",
        "line": test[-1] if test else "",
    }


def _short(path: Any) -> str:
    parts = Path(path).parts
    for root in ("site-packages", "tests"):
        if root in parts:
            return "/".join(parts[len(parts) - parts[::-1].index(root) :])
    return "/".join(parts[len(parts) - parts[::-1].index("peftcore") - 1 :]) if "peftcore" in parts else str(path)


def read(results: Path) -> list[dict[str, Any]]:
    """Return the lines of a file of results; a last line that was cut off is left out."""
    if not results.exists():
        return []
    return [json.loads(line) for line in results.read_text(encoding="utf-8").split("\n")[:-1]]


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.hf_peft_tests_side")
    parser.add_argument("library", choices=["peft", "peftcore"])
    parser.add_argument("file", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--sample", type=int, default=1)
    parser.add_argument("--test-limit", type=int, default=300)
    parser.add_argument("--select", default="")
    options = parser.parse_args()
    if os.environ.get("HF_HUB_OFFLINE"):
        stay_offline()
    wording = Wording()
    if options.library == "peftcore":
        importlib.import_module("peftcore.as_peft")
        add_missing_names(options.file)
        wording.install()
    arguments = [str(options.file), "-q", "--no-header", "--tb=no", "-p", "no:cacheprovider", "-o", "addopts="]
    arguments += ["-o", "filterwarnings="]  # deprecations of a newer transformers are errors in HF PEFT's settings
    arguments += [f"--rootdir={options.file.parents[1]}", f"--timeout={options.test_limit}", "-k", options.select]
    status = pytest.main(arguments, plugins=[Recorder(options.results, options.sample, wording)])
    if options.library == "peftcore" and status == 1:
        wording.install_everywhere()
        pytest.main(arguments, plugins=[Recorder(options.results, options.sample, wording, again=True)])
    sys.exit(0 if status in (0, 1, 5) else int(status))  # 1: tests failed, 5: none were left


if __name__ == "__main__":
    main()
