"""Git by plumbing: commits and tags that leave the user's branch, index and uncommitted work alone."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from flows.errors import RepositoryError
from flows.runtime.git import Git, GitError
from flows.runtime.inputs import uncommitted_files
from flows.runtime.project import stage_environment


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    for command in (["init", "--quiet"], ["config", "user.name", "Ada"], ["config", "user.email", "ada@example.org"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "kept.py").write_text("1\n")
    (tmp_path / "code" / "gone.py").write_text("2\n")
    (tmp_path / "notes.txt").write_text("3\n")
    subprocess.run(["git", "add", "--all"], cwd=tmp_path, check=True)
    subprocess.run(["git", "commit", "--quiet", "--message=Start"], cwd=tmp_path, check=True)
    return tmp_path


def state(root: Path) -> dict[str, Any]:
    """All that a user would notice."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout

    index = (root / ".git" / "index").read_bytes()
    return {
        "index": index,
        "head": (root / ".git" / "HEAD").read_text(),
        "branches": git("for-each-ref", "refs/heads"),
        "status": git("--no-optional-locks", "status", "--porcelain"),
        "stash": git("stash", "list"),
        "files": {
            str(path): path.read_bytes() for path in root.rglob("*") if path.is_file() and ".git" not in path.parts
        },
    }


def test_snapshot_holds_the_working_tree_and_leaves_everything_as_it_was(repository: Path) -> None:
    git = Git(repository)
    (repository / "code" / "kept.py").write_text("changed\n")
    (repository / "code" / "gone.py").unlink()
    (repository / "code" / "untracked.py").write_text("new\n")
    (repository / "notes.txt").write_text("staged\n")
    subprocess.run(["git", "add", "notes.txt"], cwd=repository, check=True)
    (repository / "result.json").write_text("{}")
    before = state(repository)

    commit = git.snapshot(["code", "absent"], ["result.json"], {"deep/record.json": "text"}, "A run\n")

    assert state(repository) == before
    names = git.run("ls-tree", "-r", "--name-only", commit).split()
    assert names == ["code/kept.py", "deep/record.json", "notes.txt", "result.json"]
    assert git.show(commit, "code/kept.py") == "changed\n"
    assert git.show(commit, "notes.txt") == "3\n", "what was only staged is not part of the run"
    assert git.run("rev-parse", f"{commit}^").strip() == git.head()


def test_snapshot_takes_ignored_files_that_are_asked_for(repository: Path) -> None:
    (repository / ".gitignore").write_text("result.json\n")
    (repository / "result.json").write_text("{}")
    git = Git(repository)
    assert git.show(git.snapshot([], ["result.json"], {}, "m"), "result.json") == "{}"


@pytest.mark.parametrize("left_out", ["/code", "/code/gone.py"])
def test_a_sparse_checkout_loses_no_file_that_it_leaves_out(repository: Path, left_out: str) -> None:
    git = Git(repository)
    patterns = ["/*", f"!{left_out}", "!/data"]
    subprocess.run(["git", "sparse-checkout", "set", "--no-cone", *patterns], cwd=repository, check=True)
    assert not (repository / "code" / "gone.py").exists()
    (repository / "data").mkdir()
    (repository / "data" / "rows.jsonl").write_text("{}\n")
    (repository / "notes.txt").write_text("changed\n")
    commit = git.snapshot(["code", "notes.txt"], ["data/rows.jsonl"], {"code/record.json": "text"}, "A run\n")
    changes = git.run("diff", "--name-status", "HEAD", commit).split()
    assert changes == ["A", "code/record.json", "A", "data/rows.jsonl", "M", "notes.txt"]
    git.commit(["data/rows.jsonl"], "Data\n")
    assert git.run("diff", "--name-status", "HEAD^", "HEAD").split() == ["A", "data/rows.jsonl"]


def test_uncommitted_files_are_changed_and_new_ones_and_the_index_is_left_alone(repository: Path) -> None:
    (repository / "code" / "kept.py").write_text("changed\n")
    (repository / "new name.txt").write_text("")
    os.utime(repository / "notes.txt", (1, 1))  # git would want to refresh this in the index
    index = (repository / ".git" / "index").read_bytes()
    assert uncommitted_files(Git(repository), excluded=["notes.txt"]) == ["code/kept.py", "new name.txt"]
    assert uncommitted_files(Git(repository), excluded=["code"]) == ["new name.txt"]
    assert (repository / ".git" / "index").read_bytes() == index


def test_tags_are_dated_strictly_later_and_a_name_is_given_once(repository: Path) -> None:
    git = Git(repository)
    future = 4_000_000_000
    git.create_tag("one", git.head(), "first\n\nbody", after=0)
    git.create_tag("two", git.head(), "second", after=future)
    first, second = git.tags("*")
    assert (first.name, first.commit, first.message.strip()) == ("one", git.head(), "first\n\nbody")
    assert second.created == future + 1
    with pytest.raises(GitError, match="already exists"):
        git.create_tag("one", git.head(), "again", after=0)


def test_lightweight_tags_are_no_events(repository: Path) -> None:
    subprocess.run(["git", "tag", "light"], cwd=repository, check=True)
    assert Git(repository).tags("*") == []


def test_a_machine_without_identity_gets_one_for_these_commits_only(repository: Path) -> None:
    for key in ("user.name", "user.email"):
        subprocess.run(["git", "config", "--unset", key], cwd=repository, check=True)
    git = Git(repository)
    commit = git.snapshot([], [], {"a": "b"}, "m")
    git.create_tag("t", commit, "m", after=0)
    assert git.run("show", "--no-patch", "--format=%an <%ae>", commit).strip() == "peftcore <peftcore@localhost>"
    assert "user.name" not in git.run("config", "--list")


def test_commits_of_a_machine_are_not_signed_by_the_users_key(repository: Path) -> None:
    settings = {
        "commit.gpgSign": "true",
        "gpg.program": "false",
    }  # such as a key whose passphrase nobody enters at night
    for key, value in settings.items():
        subprocess.run(["git", "config", key, value], cwd=repository, check=True)
    git = Git(repository)
    git.snapshot([], [], {"a": "b"}, "m")
    (repository / "notes.txt").write_text("new\n")
    before = git.head()
    git.commit(["notes.txt"], "m")
    assert git.head() != before


@pytest.mark.parametrize("name", ["pre-commit", "prepare-commit-msg", "commit-msg", "reference-transaction"])
def test_the_users_hooks_do_not_decide_on_commits_of_a_machine(repository: Path, name: str) -> None:
    hook = repository / "hooks" / name
    hook.parent.mkdir()
    hook.write_text("#!/bin/sh\nexit 1\n")
    hook.chmod(0o755)
    subprocess.run(["git", "config", "core.hooksPath", str(hook.parent)], cwd=repository, check=True)
    (repository / "notes.txt").write_text("changed\n")
    git = Git(repository)
    git.commit(["notes.txt"], "Notes\n")
    assert git.show("HEAD", "notes.txt") == "changed\n"


def test_identity_of_the_configuration_and_of_the_environment_wins(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git = Git(repository)
    assert git.run("show", "--no-patch", "--format=%an", git.snapshot([], [], {"a": "b"}, "m")).strip() == "Ada"
    monkeypatch.setenv("GIT_AUTHOR_NAME", "Grace")
    assert git.run("show", "--no-patch", "--format=%an", git.snapshot([], [], {"a": "c"}, "m")).strip() == "Grace"


def test_a_hook_of_another_repository_leaves_the_folder_s_repository_in_use(
    repository: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path_factory.mktemp("other")
    subprocess.run(["git", "init", "--quiet"], cwd=other, check=True)
    git = Git(repository)
    with monkeypatch.context() as hook:
        hook.setenv("GIT_DIR", str(other / ".git"))
        hook.setenv("GIT_INDEX_FILE", str(other / ".git" / "index"))
        (repository / "notes.txt").write_text("4\n")
        git.commit(["notes.txt"], "Notes")
        assert Git(repository).show("HEAD", "notes.txt") == "4\n"
        assert "GIT_DIR" not in stage_environment()
    assert not (other / ".git" / "index").exists()
    assert state(repository)["status"] == ""


def test_the_main_working_tree_of_each_layout(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    def git(folder: Path, *arguments: str) -> None:
        subprocess.run(["git", "-c", "protocol.file.allow=always", *arguments], cwd=folder, check=True)

    elsewhere = tmp_path_factory.mktemp("elsewhere")
    git(repository, "worktree", "add", "--quiet", "--detach", str(elsewhere / "linked"))
    assert Git(elsewhere / "linked").main_top() == Git(repository).main_top() == repository
    git(elsewhere, "clone", "--quiet", "--bare", str(repository), "bare.git")
    git(elsewhere / "bare.git", "worktree", "add", "--quiet", "--detach", str(elsewhere / "beside"))
    assert Git(elsewhere / "beside").main_top() == elsewhere / "beside"
    git(elsewhere, "init", "--quiet", "outer")
    git(elsewhere / "outer", "submodule", "--quiet", "add", str(repository), "inner")
    assert Git(elsewhere / "outer" / "inner").main_top() == elsewhere / "outer" / "inner"


def test_a_remote_with_a_relative_path_is_found_from_each_working_tree(repository: Path, tmp_path: Path) -> None:
    subprocess.run(["git", "init", "--quiet", "--bare", str(tmp_path / "remote")], check=True)
    subprocess.run(["git", "remote", "add", "origin", "remote"], cwd=repository, check=True)
    tree = tmp_path / "deep" / "down" / "tree"  # as that of a retraining
    subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(tree)], cwd=repository, check=True)
    git = Git(tree)
    git.create_tag("t", git.head(), "m", after=0)
    git.push_tags("origin", ["t"])
    assert git.remote_objects("origin", ["t"]) == git.fetch_tags("origin", "refs/peftcore/fetched")


def test_no_repository_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(RepositoryError, match=r"not in a git repository.*git init"):
        Git(tmp_path)


def test_a_repository_of_another_user_gets_git_s_own_advice(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    with pytest.raises(RepositoryError, match=r"dubious ownership(.|\n)*--add safe.directory"):
        Git(repository)


def test_no_commit_says_what_to_do(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    with pytest.raises(RepositoryError, match=r"no git commit yet.*git commit"):
        Git(tmp_path)


def test_a_sub_folder_of_a_repository_is_refused(repository: Path) -> None:
    with pytest.raises(RepositoryError, match="its git repository begins at"):
        Git(repository / "code")


def test_no_git_says_so(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(repository))
    with pytest.raises(RepositoryError, match="git is not installed"):
        Git(repository)
