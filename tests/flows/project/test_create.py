"""`peftcore init` makes a project of a folder, and changes nothing if something is in its way."""

import errno
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from check_jsonschema import main as check_schema
from ruamel.yaml import YAML

from flows.errors import ParamsError, RepositoryError
from flows.params import load_params
from flows.project.create import (
    IGNORED,
    SCHEMA,
    STAGES,
    WORKFLOW,
    NewProject,
    create_project,
    difference,
    name_from,
    pipeline_text,
    upgraded_files,
    values_of,
)
from flows.runtime.project import dvc, stage_order
from flows.runtime.stage_dependencies import PACKAGES
from peftcore import MissingExtraError

ROOT = Path(__file__).parents[3]


def rows(folder: Path, name: str = "rows.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text('{"prompt": "a", "completion": "b"}\n')
    return folder / name


def new(data: Path | str, **options: Any) -> NewProject:
    given: dict[str, Any] = {"name": "tickets", "base": "hub:ORG/NAME", "task": "chat", "hardware": "cpu"}
    return NewProject(data=str(data), **given | options)


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


def contents(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file() and ".git" not in file.parts)
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with data from outside of it."""
    outside, folder = rows(tmp_path_factory.mktemp("outside")), tmp_path_factory.mktemp("made")
    written = create_project(folder, new(outside))
    assert all((folder / name).is_file() for name in written)
    return folder


def test_the_stages_are_this_repository_s_with_digests_in_place_of_source_files(made: Path) -> None:
    here, there = (YAML(typ="safe").load(folder / "dvc.yaml") for folder in (ROOT, made))
    digests = YAML(typ="safe").load(made / STAGES)["stages"]
    assert list(there["stages"]) == list(here["stages"]) == list(digests)
    for name, stage in here["stages"].items():
        own = there["stages"][name]
        assert own["params"] == [*stage.get("params", []), {STAGES: [f"stages.{name}"]}]
        assert own.get("deps", []) == [dep for dep in stage["deps"] if dep.partition("/")[0] not in PACKAGES]
        assert {key: own[key] for key in ("cmd", "outs")} == {key: stage[key] for key in ("cmd", "outs")}
    assert there["artifacts"]["tickets"]["path"] == "artifacts/adapter"
    assert there["plots"] == here["plots"]
    assert stage_order(made)[-1] == "register"
    assert "fetch" in json.loads(dvc(made, "status", "--json"))


def test_the_data_is_copied_and_git_ignores_what_the_pipeline_makes(made: Path) -> None:
    assert (made / "data" / "rows.jsonl").is_file()
    for name in ("artifacts/x", "checkpoints/x", "reports/x", ".dvc-remote/x"):
        assert git(made, "check-ignore", name).strip() == name
    assert "data/rows.jsonl" in git(made, "status", "--porcelain", "--untracked-files=all")


def test_hidden_files_are_not_copied(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = rows(tmp_path / "outside").parent
    (folder / "._rows.jsonl").write_bytes(b"\x00\x05\x16\x07")
    (tmp_path / "made").mkdir()
    create_project(tmp_path / "made", new(folder))
    assert [path.name for path in (tmp_path / "made" / "data").rglob("*.jsonl")] == ["rows.jsonl"]
    assert "not copied: ._rows.jsonl: it is hidden" in caplog.text
    (tmp_path / "made" / "data" / ".DS_Store").touch()
    assert ".DS_Store" not in git(tmp_path / "made", "status", "--porcelain", "--untracked-files=all")


def test_editors_can_check_the_parameters(made: Path) -> None:
    first, *_ = (made / "params.yaml").read_text().splitlines()
    assert first == f"# yaml-language-server: $schema={SCHEMA}"
    with pytest.raises(SystemExit) as done:
        check_schema(["--schemafile", str(made / SCHEMA), str(made / "params.yaml")])
    assert done.value.code == 0


def test_nothing_is_overwritten_without_force(made: Path) -> None:
    before = contents(made)
    with pytest.raises(RepositoryError, match=r"params\.yaml, dvc\.yaml.* exist in .*--force"):
        create_project(made, new(made / "data" / "rows.jsonl"))
    assert contents(made) == before


def test_data_behind_a_link_stays_where_it_is(tmp_path: Path) -> None:
    file, folder = rows(tmp_path / "disk"), tmp_path / "folder"
    folder.mkdir()
    (folder / "data").symlink_to(tmp_path / "disk")
    written = create_project(folder, new(folder / "data" / "rows.jsonl"))
    assert load_params(folder / "params.yaml").data.source == "data/rows.jsonl"
    assert "data/rows.jsonl" not in written and file.read_text() == '{"prompt": "a", "completion": "b"}\n'


def test_a_file_in_the_way_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    data = rows(tmp_path)
    for name in (".github", "data", ".peftcore"):
        folder = tmp_path / name.strip(".")
        folder.mkdir()
        (folder / name).write_text("mine")
        with pytest.raises(RepositoryError, match=rf"{name} is a file, and `peftcore init` needs a folder there"):
            create_project(folder, new(data))
        assert {file.name for file in folder.iterdir()} == {name}
    (tmp_path / "other" / ".dvcignore").mkdir(parents=True)
    with pytest.raises(RepositoryError, match=r"\.dvcignore is a folder, and `peftcore init` writes a file there"):
        create_project(tmp_path / "other", new(data))


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    monkeypatch.setattr("os.access", lambda path, mode: path != folder)
    with pytest.raises(RepositoryError, match=r"folder cannot be written; make it writable"):
        create_project(folder, new(rows(tmp_path)))
    assert not list(folder.iterdir())


def test_lines_of_an_existing_gitignore_keep_their_bytes(tmp_path: Path) -> None:
    folder, mine = tmp_path / "folder", "# café\r\n*.log".encode("latin-1")
    folder.mkdir()
    (folder / ".gitignore").write_bytes(mine)
    create_project(folder, new(rows(tmp_path)))
    assert (folder / ".gitignore").read_bytes().startswith(mine + b"\n/artifacts\n")


def test_a_project_of_texts_takes_text_files_and_packs(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("Once upon a time.")
    for name in ("chats", "texts"):
        (tmp_path / name).mkdir()
    with pytest.raises(ParamsError, match=r"there is no \.jsonl, \.csv, \.parquet file"):
        create_project(tmp_path / "chats", new(tmp_path / "book.txt"))
    create_project(tmp_path / "texts", new(tmp_path / "book.txt", task="text"))
    params = load_params(tmp_path / "texts" / "params.yaml")
    assert (params.data.source, params.data.kind, params.train.batching) == ("data/book.txt", "text", "packed")
    assert params.train.pack_tokens >= params.data.max_length
    assert (tmp_path / "texts" / "data" / "book.txt").read_text() == "Once upon a time."


def test_after_a_full_disk_the_same_command_makes_the_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project, root = new(rows(tmp_path / "elsewhere")), tmp_path / "tickets"
    root.mkdir()

    def full(_: Path, target: Path) -> None:
        target.write_text('{"prompt": "a')
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space"):
        patched.setattr(shutil, "copyfile", full)
        create_project(root, project)
    create_project(root, project)
    assert (root / "data" / "rows.jsonl").read_text() == rows(tmp_path / "elsewhere").read_text()
    assert dvc(root, "remote", "list").startswith("local")


def test_files_of_the_user_stay(tmp_path: Path) -> None:
    git(tmp_path, "init", "--quiet")
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / ".gitignore").write_text("secret\n/artifacts")
    create_project(tmp_path, new(rows(tmp_path / "data")))
    assert (tmp_path / "README.md").read_text() == "mine"
    lines = (tmp_path / ".gitignore").read_text().splitlines()
    assert lines[:2] == ["secret", "/artifacts"] and sorted(set(lines)) == sorted(lines)
    assert set(IGNORED[".gitignore"]) <= set(lines)


def test_a_folder_of_files_and_a_hub_name_are_data_too(tmp_path: Path) -> None:
    rows(tmp_path / "many" / "deep", "a.jsonl"), rows(tmp_path / "many", "b.csv"), rows(tmp_path / "many", "C.JSONL")
    (tmp_path / "many" / "notes.txt").write_text("no data")
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, data, source in ((one, tmp_path / "many", "data/many"), (two, "hub:ORG/ROWS", "hub:ORG/ROWS")):
        folder.mkdir()
        create_project(folder, new(data))
        assert f"source: {source} " in (folder / "params.yaml").read_text()
    assert (one / "data/many/C.JSONL").is_file(), "as read_rows takes it"
    assert (one / "data/many/deep/a.jsonl").is_file() and not (one / "data/many/notes.txt").exists()
    assert (two / "data").is_dir()


def test_data_that_must_be_converted_first_are_named_with_the_way_to_do_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (many := tmp_path / "many").mkdir()
    (many / "list.json").write_text('[{"prompt": "a", "completion": "b"}]')
    (root := tmp_path / "project").mkdir()
    for data in (many, many / "list.json"):
        with pytest.raises(ParamsError, match=r"list\.json: write one row a line as \.jsonl \(`jq"):
            create_project(root, new(data))
    rows(many, "a.jsonl")
    create_project(root, new(many))
    assert "not copied: list.json: write one row a line" in caplog.text
    assert not (root / "data" / "many" / "list.json").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"data": "nothing.jsonl"}, r"there is no \.jsonl"),
        ({"base": "smollm"}, "give wheel:NAME==VERSION"),
        ({"base": "path:gone"}, "--base path:gone: there is no .*gone; give a model folder"),
        ({"name": "My Tickets"}, "give --name"),
    ],
)
def test_what_cannot_be_used_is_said_before_anything_is_written(
    options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    folder = tmp_path / "fresh"
    data = rows(folder)
    before = contents(folder)
    with pytest.raises(ParamsError, match=said):
        create_project(folder, new(**{"data": data, **options}))
    assert contents(folder) == before


def test_without_dvc_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftcore.errors.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"`peftcore init` needs dvc; install with: pip install 'peftcore\[pip"):
        create_project(tmp_path, new("stdlib:docstrings"))
    assert list(tmp_path.iterdir()) == []


def test_a_part_of_another_project_or_repository_is_refused(made: Path, tmp_path: Path) -> None:
    inner = made / "inner"
    inner.mkdir()
    with pytest.raises(RepositoryError, match="inside of the project"):
        create_project(inner, new("hub:ORG/ROWS"))
    inner.rmdir()
    git(tmp_path, "init", "--quiet")
    (tmp_path / "inner").mkdir()
    with pytest.raises(RepositoryError, match="inside of the git repository"):
        create_project(tmp_path / "inner", new("hub:ORG/ROWS"))


def test_dvc_without_a_default_remote_is_refused_and_a_remote_of_another_name_is_used(tmp_path: Path) -> None:
    git(tmp_path, "init", "--quiet")
    dvc(tmp_path, "init", "--quiet")
    with pytest.raises(RepositoryError, match="dvc remote add --default"):
        create_project(tmp_path, new("hub:ORG/ROWS"))
    dvc(tmp_path, "remote", "add", "--default", "store", str(tmp_path / "store"))
    create_project(tmp_path, new("hub:ORG/ROWS"))
    assert "remote: store " in (tmp_path / "params.yaml").read_text()


def test_an_upgrade_shows_and_writes_what_differs(made: Path) -> None:
    assert upgraded_files(made) == {}
    old = (made / "dvc.yaml").read_text()
    try:
        (made / "dvc.yaml").write_text(old.replace("      - artifacts/start\n", ""))
        files = upgraded_files(made)
        assert files == {"dvc.yaml": pipeline_text("tickets")} == {"dvc.yaml": old}
        assert "+      - artifacts/start" in difference(made, files)
    finally:
        (made / "dvc.yaml").write_text(old)


def test_an_upgrade_adds_keys_that_stages_track_to_params_yaml(made: Path) -> None:
    path, text = made / "params.yaml", (made / "params.yaml").read_text()
    try:
        path.write_text(re.sub(r"  special_tokens:.*\n( {20,}.*\n)*", "", text))
        assert "special_tokens" not in path.read_text()
        files = upgraded_files(made)
        assert files.keys() == {"params.yaml"}
        old, new = path.read_text().splitlines(), files["params.yaml"].splitlines()
        assert len(new) > len(old) and [line for line in old if line not in new] == []
        assert files["params.yaml"] == text, "keys are added at their places, with their comments"
    finally:
        path.write_text(text)


def test_an_upgrade_adds_whole_sections_and_last_keys_with_their_comments(made: Path) -> None:
    path, text = made / "params.yaml", (made / "params.yaml").read_text()
    try:
        lines = re.sub(r"^merge:\n( .*\n)*\n", "", text, flags=re.MULTILINE)
        path.write_text(re.sub(r"  start_from:.*\n( {20,}.*\n)*", "", lines))
        new = upgraded_files(made)["params.yaml"]
        assert new.splitlines() == text.splitlines()
        path.write_text("project: {name: tickets}\ndata: {source: stdlib:docstrings}\n")
        assert "project: {name: tickets, seed: 42}\n" in upgraded_files(made)["params.yaml"]
    finally:
        path.write_text(text)


@pytest.mark.parametrize(
    ("folder", "name"), [("My Tickets (2)", "my-tickets-2"), ("7days", "days"), ("日本", "adapter"), ("a_b", "a-b")]
)
def test_a_name_is_made_of_the_folder(folder: str, name: str) -> None:
    assert name_from(Path(folder)) == name


def test_a_folder_below_projects_becomes_one_of_several_projects(tmp_path: Path) -> None:
    git(tmp_path, "init", "--quiet")
    mail, sql, other = (tmp_path / "projects" / name for name in ("mail", "sql", "other"))
    for folder in (mail, sql, other):
        folder.mkdir(parents=True)
    for folder in (mail, sql):
        assert WORKFLOW not in create_project(folder, new("hub:ORG/ROWS", name=folder.name))
        assert (folder / ".dvc").is_dir() and not (folder / ".git").exists()
        assert upgraded_files(folder) == {}
        assert stage_order(folder)[-1] == "register"
    with pytest.raises(ParamsError, match=r"'mail' is that of the project .*mail"):
        create_project(other, new("hub:ORG/ROWS", name="mail"))
    assert not list(other.iterdir())
    (inner := mail / "inner").mkdir()
    with pytest.raises(RepositoryError, match="inside of the project"):
        create_project(inner, new("hub:ORG/ROWS"))


def test_a_file_of_parameters_has_some_keys_and_its_data_beside_it(tmp_path: Path) -> None:
    data = rows(tmp_path / "data")
    file = tmp_path / "params.yaml"
    file.write_text(
        "project: {name: mail}\ndata: {source: data/rows.jsonl}\nevaluate: {control: {rows: 4}}\n"
        "method: {options: {use_dora: true}}\n"
    )
    values = values_of(file)
    assert values == {
        "project.name": "mail",
        "data.source": str(data),
        "evaluate.control.rows": 4,
        "method.options": {"use_dora": True},
    }
    (folder := tmp_path / "project").mkdir()
    create_project(folder, new(values["data.source"], name="mail", values=values))
    params = load_params(folder / "params.yaml")
    assert params.data.source == "data/rows.jsonl" and params.evaluate.control.rows == 4
    assert params.method.options == {"use_dora": True}
    file.write_text("train: {epoch: 1}\n")
    with pytest.raises(ParamsError, match="did you mean epochs"):
        values_of(file)


def test_a_mixture_has_the_files_of_all_its_sources(tmp_path: Path) -> None:
    for name in ("a", "b"):
        rows(tmp_path / name, f"{name}.jsonl")
    file = tmp_path / "params.yaml"
    file.write_text(
        "data: {source: mixture, mixture: [{source: a, weight: 3}, {source: b/b.jsonl, weight: 1}, "
        "{source: 'hub:ORG/ROWS', weight: 1}, {source: 'stdlib:docstrings', weight: 2}]}\n"
    )
    (folder := tmp_path / "project").mkdir()
    values = values_of(file)
    written = create_project(folder, new(values["data.source"], values=values))
    assert {"data/a/a.jsonl", "data/b.jsonl"} <= {*written}
    mixture = load_params(folder / "params.yaml").data.mixture
    assert [one.source for one in mixture] == ["data/a", "data/b.jsonl", "hub:ORG/ROWS", "stdlib:docstrings"]
    assert "`data/a`, `data/b.jsonl`, `hub:ORG/ROWS`" in (folder / "README.md").read_text()

    rows(tmp_path / "other", "b.jsonl")
    with (tmp_path / "other" / "b.jsonl").open("a") as more:
        more.write("\n")
    file.write_text(
        "data: {source: mixture, mixture: [{source: b/b.jsonl, weight: 3}, {source: other/b.jsonl, weight: 1, "
        "name: other}]}\n"
    )
    (second := tmp_path / "second").mkdir()
    with pytest.raises(ParamsError, match=r"would both be data/b\.jsonl; rename one"):
        create_project(second, new("mixture", values=values_of(file)))
    assert not contents(second)


def test_the_standard_library_is_data_too(tmp_path: Path) -> None:
    create_project(tmp_path, new("stdlib:docstrings"))
    assert load_params(tmp_path / "params.yaml").data.source == "stdlib:docstrings"
