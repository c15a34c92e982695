"""A second working tree: the commit's files, the same cache and remote, and nothing left behind."""

from pathlib import Path
from typing import Any

import pytest

from flows.errors import RepositoryError
from flows.runtime.git import Git
from flows.runtime.project import dvc
from flows.runtime.worktree import add_worktree, remove_worktree, worktree_at


def test_it_has_the_commits_files_and_shares_cache_and_remote(project: Any) -> None:
    project.register()
    head = Git(project.root).head()
    (project.root / "params.yaml").write_text("edited: and not committed\n")
    with worktree_at(project.root, head) as tree:
        assert "docstrings" in (tree / "params.yaml").read_text()
        assert not (tree / "artifacts").exists()
        (tree / "dvc.lock").write_text((project.root / "dvc.lock").read_text())
        dvc(tree, "checkout", "make")  # from the cache
        assert (tree / "artifacts/adapter/adapter_model.safetensors").exists()
        assert Path(dvc(tree, "config", "cache.dir").strip()) == project.root / ".dvc" / "cache"
        (project.root / ".dvc" / "cache").rename(project.root / "cache-away")
        dvc(tree, "pull", "make")  # from the remote, whose url is relative in the repository
        Git(tree).run("tag", "made-there")
    assert "made-there" in project.git("tag")
    assert not tree.exists()
    assert project.git("worktree", "list").count("\n") == 1


def test_it_is_gone_after_an_error_and_a_wrong_commit_is_named(project: Any) -> None:
    with pytest.raises(ZeroDivisionError), worktree_at(project.root, "HEAD") as tree:
        raise ZeroDivisionError
    assert not tree.exists()
    with pytest.raises(RepositoryError, match="no working tree of nowhere"), worktree_at(project.root, "nowhere"):
        pass
    assert project.git("worktree", "list").count("\n") == 1


def test_local_settings_hold_there_too(project: Any) -> None:
    (project.root / ".dvc" / "config.local").write_text("['remote \"local\"']\n    jobs = 3\n")
    with worktree_at(project.root, "HEAD") as tree:
        assert dvc(tree, "config", "remote.local.jobs").strip() == "3"
        assert Path(dvc(tree, "config", "remote.local.url").strip()).resolve() == project.root / ".dvc-remote"
        assert (tree / ".dvc" / "config.local").stat().st_mode & 0o077 == 0


def test_folders_with_umlauts_share_their_cache_and_remote(project: Any, tmp_path: Path) -> None:
    root = project.root.rename(tmp_path / "Jürgens Projekt, 中文")
    with worktree_at(root, "HEAD") as tree:
        assert Path(dvc(tree, "config", "cache.dir").strip()) == root / ".dvc" / "cache"
        assert Path(dvc(tree, "config", "remote.local.url").strip()).resolve() == root / ".dvc-remote"


def test_the_users_hooks_do_not_run_there(project: Any) -> None:
    hook = project.root / ".git" / "hooks" / "post-checkout"  # `dvc install` makes one that fails there
    hook.parent.mkdir(exist_ok=True)
    hook.write_text("#!/bin/sh\nexit 1\n")
    hook.chmod(0o755)
    with worktree_at(project.root, "HEAD") as tree:
        assert (tree / "params.yaml").exists()


def test_a_submodule_is_refused(project: Any, tmp_path: Path) -> None:
    outer = tmp_path / "outer"
    outer.mkdir()
    project.git("init", "--quiet", root=outer)
    project.git(
        *("-c", "protocol.file.allow=always", "submodule", "--quiet", "add", str(project.root), "inner"), root=outer
    )
    with pytest.raises(RepositoryError, match="is a git submodule"), worktree_at(outer / "inner", "HEAD"):
        pass


def test_a_tree_whose_making_was_killed_can_be_made_again(project: Any, tmp_path: Path) -> None:
    folder = tmp_path / "tree"
    add_worktree(project.root, folder, "HEAD")
    # `git worktree add` locks the tree until it has written all files
    project.git("worktree", "lock", "--reason", "initializing", str(folder))
    remove_worktree(project.root, folder)
    assert project.git("worktree", "list").count("\n") == 1
    assert (add_worktree(project.root, folder, "HEAD") / "params.yaml").exists()
