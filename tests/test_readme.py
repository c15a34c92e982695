"""README and documentation are true: the example runs, tables match the project, links and paths exist."""

import re
import tomllib
from pathlib import Path

import pytest

from peftcore.registry import method_table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCS = ROOT / "docs"
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted(DOCS.rglob("*.md")),
    *(ROOT / folder / "README.md" for folder in ("benchmarks", "data", "peftcore/methods")),
    *sorted((ROOT / "examples").rglob("README.md")),
]
PLACES = {"{rule.metric}": "METRIC", "{suite}": "NAME", "{task}": "NAME"}
"""{part of a check's name in the source: its word in docs/promotion.md}"""


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def without_code(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", without_code(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert example and len([line for line in example.group(1).splitlines() if line]) <= 15
    monkeypatch.chdir(tmp_path)
    exec(compile(example.group(1), "README.md", "exec"), {})
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").exists()


def test_the_readme_is_short() -> None:
    assert len(README.split()) <= 1000, "move details to a page in docs/"


def test_the_method_table_is_the_registrys() -> None:
    table = method_table()
    assert table in (DOCS / "methods.md").read_text(), f"put this table into docs/methods.md:\n{table}"


def test_the_page_of_the_gate_lists_its_checks_in_order_and_all_pages_count_them() -> None:
    source = (ROOT / "flows" / "gate" / "gate.py").read_text()
    named = re.findall(r'(?:yield|name =) f?"([^"]+)"', source.partition("def _checks")[2])
    checks = [re.sub(r"\{(?:rule\.metric|suite|task)\}", lambda m: PLACES[m[0]], name) for name in named]
    table = (DOCS / "promotion.md").read_text().partition("| check | passes if")[2].partition("\n\n")[0]
    cells = [row.split("|")[1].strip() for row in table.splitlines()[2:]]
    assert ", ".join(cells) == ", ".join(checks)
    for page in (README, (DOCS / "pipeline.md").read_text(), (DOCS / "promotion.md").read_text()):
        assert re.findall(r"(\d+) checks", page) == [str(len(checks))]


def test_every_dependency_has_its_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {"": project["dependencies"], **project["optional-dependencies"]}
    declared = {(re.split(r"[<>=\[]", one)[0], extra) for extra, named in extras.items() for one in named}
    tables = (DOCS / "dependencies.md").read_text().partition("## The library")[2].partition("## Systems")[0]
    rows = re.findall(r"^\| ([\w.-]+) \|(?: (\w+) \|)? [^|]+ \|$", tables, re.MULTILINE)
    listed = {(name, extra) for name, extra in rows if name != "package"}
    twice = {("dvc-s3", "dev"), *((name, extra) for name, extra in declared if name == "peftcore")}
    assert listed == declared - twice, "docs/dependencies.md gives each package its extra and a reason"


def test_the_readme_leads_to_every_page() -> None:
    for page in DOCS.glob("*.md"):
        assert f"(docs/{page.name})" in README, f"README.md has no link to docs/{page.name}"


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if re.match(r"https?:|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page.name} links to {target}, which does not exist"
        if anchor:
            assert anchor in anchors(linked), f"{page.name} links to {target}, and {linked.name} has no such heading"


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_named_files_and_programs_exist(page: Path) -> None:
    text = page.read_text()
    named = re.findall(r"(?<![\w./<-])(?:benchmarks|docs|flows|peftcore|tests)/[\w./-]*\w", text)
    for name in named:
        if not re.search(r"\b(?:NAME|a/b|test_b|test_ssf|stages/lengths|serving-)", name):
            assert (ROOT / name).exists() or (page.parent / name).exists(), f"{page.name} names {name}"
    for program in re.findall(r"-m (benchmarks\.\w+)", text):
        assert (ROOT / f"{program.replace('.', '/')}.py").exists(), f"{page.name} names {program}"
