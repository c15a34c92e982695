"""A version's commit has what a rebuild needs and no secret."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from flows.errors import RepositoryError
from flows.registry import commit_files
from flows.registry.commit_files import check_no_secrets, data_files
from flows.registry.registry import Registry
from flows.runtime.git import Git
from flows.runtime.project import dvc

S3 = "['remote \"extra\"']\n    url = s3://bucket\n"
HTTP = "['remote \"extra\"']\n    url = https://host.test/x\n"


def add_to_config(project: Any, text: str) -> None:
    config = project.root / ".dvc" / "config"
    config.write_text(config.read_text() + text)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (f"{S3}    secret_access_key = abc\n", 'remote "extra".secret_access_key'),
        (f"{HTTP}    password = abc\n", 'remote "extra".password'),
        (HTTP.replace("host", "user:abc@host"), 'remote "extra".url'),
    ],
    ids=["key", "password", "url"],
)
def test_an_uncommitted_secret_stops_the_registration_before_anything(project: Any, text: str, named: str) -> None:
    add_to_config(project, text)
    with pytest.raises(RepositoryError, match=r"would commit and push it; move it to \.dvc/config\.local") as caught:
        project.register()
    assert named in str(caught.value) and "abc" not in str(caught.value)
    assert Registry(Git(project.root), "docstrings").versions() == []


def test_what_is_committed_already_or_no_secret_is_let_through(project: Any) -> None:
    add_to_config(project, f"{S3}    secret_access_key = abc\n")
    project.git("add", ".dvc/config")
    project.git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "-m", "a team's own decision")
    add_to_config(project, "    region = eu\n    endpointurl = https://s3.test:9000/a@b\n")
    check_no_secrets(Git(project.root), project.root)


def own_data(project: Any) -> Path:
    (project.root / "data").mkdir(exist_ok=True)
    file = project.root / "data" / "qa.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n')
    with project.paths.params.open("a") as params:
        params.write("data: {source: data/qa.jsonl}\n")
    return file


def test_untracked_data_are_in_the_version_s_commit_and_not_in_the_user_s_index(project: Any) -> None:
    own_data(project)
    project.register(weight=2.0)
    registry = Registry(Git(project.root), "docstrings")
    assert registry.git.show(registry.versions()[-1].commit, "data/qa.jsonl").startswith('{"prompt"')
    assert project.git("ls-files", "data/qa.jsonl") == ""


def test_untracked_files_of_each_source_of_a_mixture_are_committed(project: Any) -> None:
    report = json.loads(project.paths.data_report.read_text())
    names = ["more/a.jsonl", "more/b.jsonl"]
    (project.root / "more").mkdir()
    for name in names:
        (project.root / name).write_text("{}\n")
    report |= {"source": "mixture", "mixture": {name: {"source": name} for name in names}}
    project.paths.data_report.unlink()
    project.paths.data_report.write_text(json.dumps(report))
    assert data_files(project.paths, Git(project.root))[0] == names


def test_data_of_dvc_add_are_pushed_and_their_pointer_is_in_the_commit(project: Any) -> None:
    file = own_data(project)
    dvc(project.root, "add", "--quiet", "data/qa.jsonl")
    project.register(weight=2.0)
    registry = Registry(Git(project.root), "docstrings")
    commit = registry.versions()[-1].commit
    assert "qa.jsonl" in registry.git.show(commit, "data/qa.jsonl.dvc")
    listed = subprocess.run(["git", "ls-tree", "--name-only", "-r", commit, "data/"], cwd=project.root, check=True,
                            capture_output=True, text=True).stdout.split()  # fmt: skip
    assert "data/qa.jsonl" not in listed
    digest = next(
        line.split()[-1] for line in registry.git.show(commit, "data/qa.jsonl.dvc").splitlines() if "md5:" in line
    )
    remote = project.root / ".dvc-remote" / "files" / "md5" / digest[:2] / digest[2:]
    assert remote.read_bytes() == file.read_bytes()


def test_large_untracked_data_belong_to_dvc(project: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    own_data(project)
    monkeypatch.setattr(commit_files, "LARGEST", 10)
    with pytest.raises(RepositoryError, match=r"run `dvc add data/qa\.jsonl`"):
        project.register(weight=2.0)
