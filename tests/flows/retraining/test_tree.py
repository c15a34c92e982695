"""The working tree of a retraining: found again, and its checkpoints with it."""

from pathlib import Path
from typing import Any

import pytest

from flows.retraining import tree as module
from flows.retraining.tree import (
    home,
    is_unfinished,
    note_unfinished,
    remove_working_tree,
    unfinished_since,
    working_tree,
)


def commit(project: Any) -> None:
    project.git("commit", "--quiet", "--allow-empty", "--message=Another")


def test_checkpoints_outlive_another_commit(project: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = working_tree(project.root)
    saved = tree / "checkpoints" / "run" / "step"
    saved.parent.mkdir(parents=True)
    saved.write_text("1")
    (tree / "left").touch()
    note_unfinished(project.root, "2026-01-01T03:00:00+00:00")
    assert working_tree(project.root) == tree and (tree / "left").exists(), "the same commit: the same tree"
    commit(project)
    assert working_tree(project.root) == tree
    assert saved.read_text() == "1" and not (tree / "left").exists()
    assert is_unfinished(project.root) and unfinished_since(project.root) == "2026-01-01T03:00:00+00:00"

    # killed while the tree is made anew
    commit(project)
    monkeypatch.setattr(module, "add_worktree", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        working_tree(project.root)
    monkeypatch.undo()
    assert not saved.exists()
    working_tree(project.root)
    assert saved.read_text() == "1"

    remove_working_tree(project.root)
    assert unfinished_since(project.root) is None
    assert not is_unfinished(project.root) and not tree.exists() and not (home(project.root) / "checkpoints").exists()


def test_a_tree_that_is_half_removed_is_not_used_again(project: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = working_tree(project.root)

    def killed(_: Any, folder: Path) -> None:
        (folder / "dvc.yaml").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(module, "remove_worktree", killed)
        remove_working_tree(project.root)
    assert working_tree(project.root) == tree
    assert (tree / "dvc.yaml").exists()
