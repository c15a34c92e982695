"""Several projects of one git repository: each with its own versions and champion, and one table and page over all."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from flows.errors import RepositoryError
from flows.gate.promote import promote
from flows.paths import Paths
from flows.pipeline.projects import COLUMNS, statuses, write_projects_page
from flows.registry.project_registry import registry_of
from flows.retraining.tree import remove_working_tree, working_tree
from flows.runtime.git import Git
from flows.runtime.inputs import uncommitted_files
from flows.runtime.project import files_at, project_roots
from flows.runtime.worktree import worktree_at


def registry(project: Any) -> Any:
    return registry_of(project.params, project.root)


def test_each_has_its_own_versions_and_champion(two_projects: tuple[Any, Any]) -> None:
    mail, sql = two_projects
    record = mail.register(loss=2.5)
    assert record["git"]["uncommitted"] == ["source/evaluation/metrics.json", "source/evaluation/rows.parquet"]
    assert promote(mail.params, mail.paths).tag == "mail#champion#1"
    sql.register(loss=2.6, weight=2.0)
    assert promote(sql.params, sql.paths, dry_run=True).outcome == "would promote"
    mail.register(loss=2.4, weight=3.0)
    assert mail.git("tag", "--list").split() == ["mail#champion#1", "mail@v0.1.0", "mail@v0.1.1", "sql@v0.1.0"]
    assert [one.number for one in registry(sql).versions()] == ["v0.1.0"]
    assert registry(mail).stages()["champion"].version == "v0.1.0"
    assert registry(sql).stages() == {}


def test_a_version_s_commit_has_the_project_s_files_at_their_place(two_projects: tuple[Any, Any]) -> None:
    mail, sql = two_projects
    (mail.root / "make.py").write_text((mail.root / "make.py").read_text() + "# changed\n")
    (sql.root / "make.py").write_text((sql.root / "make.py").read_text() + "# not in mail's version\n")
    assert uncommitted_files(Git(mail.root)) == ["make.py"]
    mail.register(loss=2.5)
    (version,) = registry(mail).versions()
    changed = mail.git("diff", "--name-only", "HEAD", version.commit).split()
    assert {"projects/mail/dvc.lock", "projects/mail/registry/version.json"} <= set(changed)
    assert all(name.startswith("projects/mail/") for name in changed)
    assert registry(mail).record(version)["version"] == "v0.1.0"


@pytest.mark.parametrize("cached", [True, False])
def test_files_of_a_version_come_from_the_cache_or_the_remote(
    two_projects: tuple[Any, Any], cached: bool, caplog: pytest.LogCaptureFixture
) -> None:
    _, sql = two_projects
    sql.register(loss=2.5)
    (version,) = registry(sql).versions()
    expected = (sql.paths.adapter / "adapter_model.safetensors").read_bytes()
    sql.register(loss=2.4, weight=2.0)  # so the files are no longer those of the working tree
    if not cached:
        shutil.rmtree(sql.root / ".dvc" / "cache")
    with files_at(sql.root, version.commit, ["artifacts/adapter"]) as folder:
        assert (folder / "artifacts" / "adapter" / "adapter_model.safetensors").read_bytes() == expected
    assert "failed to collect" not in caplog.text
    digest = hashlib.md5(expected).hexdigest()
    assert (sql.root / ".dvc/cache/files/md5" / digest[:2] / digest[2:]).read_bytes() == expected


def test_a_damaged_object_of_the_remote_is_refused(two_projects: tuple[Any, Any]) -> None:
    _, sql = two_projects
    sql.register(loss=2.5)
    (version,) = registry(sql).versions()
    digest = hashlib.md5((sql.paths.adapter / "adapter_model.safetensors").read_bytes()).hexdigest()
    shutil.rmtree(sql.root / ".dvc" / "cache")
    damaged = sql.root / ".dvc-remote" / "files" / "md5" / digest[:2] / digest[2:]
    damaged.chmod(0o644)
    damaged.write_bytes(b"damaged")
    for _ in range(2):
        with (
            pytest.raises(RepositoryError, match=f"object of the remote is damaged or absent: .*{digest[2:]}"),
            files_at(sql.root, version.commit, ["artifacts/adapter"]),
        ):
            pass


def test_a_working_tree_is_the_project_s_folder_with_its_cache(two_projects: tuple[Any, Any]) -> None:
    mail, _ = two_projects
    with worktree_at(mail.root, mail.git("rev-parse", "HEAD").strip()) as tree:
        assert tree.parts[-2:] == ("projects", "mail")
        assert (tree / "params.yaml").is_file()
        assert str(mail.root / ".dvc" / "cache") in (tree / ".dvc" / "config.local").read_text()
    assert not tree.exists()


def test_a_retraining_works_in_the_project_s_folder_of_its_tree(two_projects: tuple[Any, Any]) -> None:
    mail, _ = two_projects
    tree = working_tree(mail.root)
    assert tree.parts[-2:] == ("projects", "mail") and (tree / "dvc.yaml").is_file()
    checkpoint = Paths(tree).checkpoints / "one"
    checkpoint.mkdir(parents=True)
    mail.git("commit", "--quiet", "--allow-empty", "--message=Another")
    assert working_tree(mail.root) == tree and checkpoint.is_dir(), "another commit's tree has the checkpoints"
    remove_working_tree(mail.root)
    assert not tree.exists()


def test_projects_are_found_from_anywhere_in_the_repository(two_projects: tuple[Any, Any]) -> None:
    mail, sql = two_projects
    top = mail.root.parents[1]
    (top / "projects" / "notes").mkdir()
    for start in (top, mail.root, sql.root / "source"):
        assert project_roots(start) == [mail.root, sql.root]


def test_one_table_and_one_page_over_all(two_projects: tuple[Any, Any], tmp_path: Path) -> None:
    mail, sql = two_projects
    mail.register(loss=2.5)
    promote(mail.params, mail.paths)
    mail.paths.review.parent.mkdir(exist_ok=True)
    mail.paths.review.write_text("review")
    sql.paths.params.write_text("project: {name: <sql>}\n")
    rows = statuses(project_roots(mail.root))
    first, second = (dict(zip(COLUMNS, row.cells(), strict=True)) for row in rows)
    assert first["folder"] == "projects/mail" and first["champion"] == "v0.1.0, test loss 2.500"
    assert first["newest"] == "v0.1.0, promoted" and first["retraining"] == "no schedule"
    assert "cannot be read" in second["next"] and "project.name" in second["next"], "one never hides the others"
    assert json.loads(json.dumps([row.as_dict() for row in rows]))[0]["facts"]["champion"]["version"] == "v0.1.0"
    page = mail.root.parents[1] / "projects.html"
    write_projects_page(rows, page)
    text = page.read_text()
    assert '<a href="projects/mail/reports/review.html">mail</a>' in text
    assert "<sql>" not in text and "&lt;sql&gt;" in text


def test_a_folder_of_a_repository_that_is_no_project_is_still_refused(two_projects: tuple[Any, Any]) -> None:
    mail, _ = two_projects
    with pytest.raises(RepositoryError, match=r"its git repository begins at .*several projects"):
        Git(mail.root / "source")
