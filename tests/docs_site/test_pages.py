"""Tutorial and guides are true: their Python runs, the commands of all pages exist, and the site builds."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from docs_site.commands import command_line
from flows.params import Params
from flows.params.section import Section
from flows.project.presets import TASKS, preset

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
GUIDES = sorted([*DOCS.glob("tutorial/*.md"), *DOCS.glob("how-to/*.md")])
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "data/README.md")),
    *sorted(DOCS.rglob("*.md")),
    *sorted((ROOT / "examples").rglob("README.md")),
]
LONG = ("calibrated-base", "merge-and-export", "qlora")
ELSEWHERE = ("add-a-storage", "structured-output")
"""Pages whose Python tests/peftcore/bases/test_storages.py and tests/peftcore/serving/test_protocol.py run."""


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    """Return the fenced code blocks of a page, also those in lists."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", page.read_text(), re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", code, flags=re.MULTILINE) for indent, code in found]


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words after `peftcore` of each such command in lines of a shell."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
        lexer.whitespace_split, lexer.commenters = True, "#"
        command: list[str] = []
        for word in [*lexer, ";"]:
            if not re.fullmatch("[&|;<>]+", word):
                command.append(word)
                continue
            while command and re.fullmatch(r"\w+=.*", command[0]):
                command.pop(0)
            if command[:1] == ["peftcore"]:
                yield command[1:]
            command = []


def with_command(words: list[str]) -> tuple[Any, list[str]]:
    """Return the command that words name, and the words after its name."""
    command, words = command_line(), list(words)
    while words and hasattr(command, "commands") and not words[0].startswith("-"):
        name = words.pop(0)
        assert name in command.commands, f"there is no command {name!r}"
        command = command.commands[name]
    return command, words


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=name_of(page), marks=[pytest.mark.slow] if page.stem in LONG else [])
        for page in GUIDES
        if blocks(page, "python") and page.stem not in ELSEWHERE
    ],
)
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "example"}
    for code in blocks(page, "python"):
        exec(compile(code, name_of(page), "exec"), names)


def parse(command: Any, options: list[str]) -> None:
    """Parse options without running the command; a file or folder that they name is made if it has to exist."""
    try:
        command.make_context("peftcore", list(options))
    except Exception as error:
        absent = re.search(r"'([^']+)' does not exist", str(error))
        if absent is None:
            raise AssertionError(f"{shlex.join(options)}: {error}") from error
        path = Path(absent[1])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch() if path.suffix or path.name == "FILE" else path.mkdir()
        parse(command, options)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "sh")], ids=name_of)
def test_commands_exist(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for words in [words for code in blocks(page, "sh") for words in commands(code)]:
        command, options = with_command(words)
        if options != ["--help"]:
            parse(command, options)


@pytest.mark.parametrize("page", [*GUIDES, *sorted((ROOT / "examples").rglob("README.md"))], ids=name_of)
def test_a_new_project_is_committed_before_a_run_and_prepared_before_the_doctor(page: Path) -> None:
    for code in blocks(page, "sh"):
        missing: set[str] = set()
        for line in code.splitlines():
            if re.match(r"peftcore (init|import) (?!--help)", line):
                missing = {"git commit", "dvc repro prepare"}
            missing -= {step for step in missing if step in line}
            if re.match("peftcore run", line):
                assert "git commit" not in missing, line
                missing.clear()
            assert not (missing and line.startswith("peftcore doctor")), f"{missing} before {line}"


def test_a_command_that_does_not_exist_is_noticed() -> None:
    (words,) = commands("KEY=1 peftcore serve --wach  # a comment")
    with pytest.raises(AssertionError, match="--wach"):
        parse(*with_command(words))
    with pytest.raises(AssertionError, match="no command 'served'"):
        with_command(["served"])


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_in_sentences_exist(page: Path) -> None:
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for code in re.findall(r"`(peftcore [^`]+)`", text):
        (words,) = commands(code)
        command, rest = with_command(words)
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert {word for word in rest if word.startswith("-")} <= known | {"--help"}, code


def parameter_exists(name: str) -> bool:
    """Return True if params.yaml has the key; keys below a mapping without fields, such as method.options, are free."""
    section: Any = Params
    for part in name.split("."):
        if not (isinstance(section, type) and issubclass(section, Section)):
            return True
        if part not in section.model_fields:
            return False
        section = section.model_fields[part].annotation
    return True


def keys_of(values: dict[str, Any], before: str = "") -> Iterator[str]:
    """Yield the names of all keys of nested mappings."""
    for key, value in values.items():
        yield f"{before}{key}"
        if isinstance(value, dict):
            yield from keys_of(value, f"{before}{key}.")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_named_parameters_exist(page: Path) -> None:
    sections = "|".join(Params.model_fields)
    named = re.findall(rf"`((?:{sections})(?:\.[a-z_0-9]+)+)", page.read_text())
    for text in blocks(page, "yaml"):
        values = YAML(typ="safe").load(text)
        if isinstance(values, dict) and values.keys() <= Params.model_fields.keys():
            named += keys_of(values)
    files = re.compile(r".*\.(ya?ml|md|py|jsonl?|parquet)")
    assert not [name for name in named if not files.fullmatch(name) and not parameter_exists(name)]


def merged(values: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """Return nested mappings with the values of `others` in place of those of `values`."""
    both = {**values, **others}
    return {
        k: merged(values[k], v) if isinstance(v, dict) and isinstance(values.get(k), dict) else v
        for k, v in both.items()
    }


def projects() -> Iterator[dict[str, Any]]:
    """Yield this repository's params.yaml, and the one of a new project of each task."""
    demonstration = YAML(typ="safe").load((ROOT / "params.yaml").read_text())
    yield demonstration
    for task in TASKS:
        values = merged(demonstration, {"data": {"source": "data/rows"}})
        for key, value in preset(task, "cpu").items():
            nested: Any = value
            for part in reversed(key.split(".")):
                nested = {part: nested}
            values = merged(values, nested)
        yield values


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "yaml")], ids=name_of)
def test_values_of_parameters_are_valid_in_a_project(page: Path) -> None:
    for text in blocks(page, "yaml"):
        values = YAML(typ="safe").load(text)
        if isinstance(values, dict) and values.keys() <= Params.model_fields.keys():
            faults = [fault for project in projects() if (fault := invalid(merged(project, values)))]
            # a rule may name a scorer or a divergence that another fragment of the page has
            assert len(faults) <= len(TASKS) or any("nothing computes it" in fault for fault in faults), faults[0]


def test_a_value_that_does_not_fit_is_noticed() -> None:
    assert all(invalid(merged(project, {"gate": {"approvals": "two"}})) for project in projects())
    assert not all(invalid(merged(project, {"gate": {"approvals": 2}})) for project in projects())


def invalid(values: dict[str, Any]) -> str:
    """Return the reason why these are no parameters of a run; "" if they are."""
    try:
        Params.model_validate(values)
    except ValueError as error:
        return str(error)
    return ""


def test_the_list_of_guides_has_all_of_them() -> None:
    listed = set(re.findall(r"\]\(([\w-]+\.md)", (DOCS / "how-to" / "index.md").read_text()))
    assert listed == {page.name for page in DOCS.glob("how-to/*.md")} - {"index.md"}


class Loaded(HTMLParser):
    """The URLs that a page loads by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag in ("script", "img", "iframe", "source"):
            self.urls.append(values.get("src") or "")
        if tag == "link" and values.get("rel") not in ("canonical", "next", "prev"):
            self.urls.append(values.get("href") or "")


@pytest.mark.slow
def test_the_site_builds_without_warnings_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="needs `pip install 'peftcore[docs]'`")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        build, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("index", "figures", "how-to/add-a-method", "reference/methods/lora", "benchmarks/results/learning"):
        assert (tmp_path / f"{name}.html").is_file()
    assert "get_peft_model" in (tmp_path / "reference" / "api" / "models.html").read_text()
    for page in tmp_path.rglob("*.html"):
        loaded = Loaded()
        loaded.feed(page.read_text())
        assert loaded.urls
        assert not [url for url in loaded.urls if re.match(r"(https?:)?//", url)], page
    for style in tmp_path.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//", style.read_text()), style
