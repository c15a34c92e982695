"""The pipeline's files: one place each, below the repository, in the folder that keeps or drops them."""

from pathlib import Path

import pytest
from ruamel.yaml import YAML

from flows.paths import SPLITS, Paths, from_here, prepare_command, stage_from_here

ROOT = Path(__file__).parents[2]


def places(root: Path) -> dict[str, Path]:
    """{name: path} of everything that `Paths` names."""
    paths = Paths(root)
    names = [name for name, value in vars(Paths).items() if isinstance(value, property)]
    return {name: getattr(paths, name) for name in names} | {split: paths.split(split) for split in SPLITS}


def outs() -> set[Path]:
    """The outputs of all stages of the shipped pipeline."""
    stages = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"].values()
    listed = [one for stage in stages for one in (*stage.get("outs", ()), *stage.get("metrics", ()))]
    return {ROOT / (one if isinstance(one, str) else next(iter(one))) for one in listed}


def test_no_two_names_are_one_path_and_all_are_below_the_root(tmp_path: Path) -> None:
    found = places(tmp_path)
    assert len(set(found.values())) == len(found) > 30
    assert all(tmp_path in path.parents for path in found.values())


def test_asking_for_a_path_creates_nothing(tmp_path: Path) -> None:
    places(tmp_path / "project")
    assert list(tmp_path.iterdir()) == []


def test_commands_name_files_and_stages_from_the_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "projects" / "mail"
    (root / "my rows").mkdir(parents=True)
    for folder, data, stage in (
        (root, "data", "prepare"),
        (root / "my rows", "../data", "../dvc.yaml:prepare"),
        (tmp_path, "projects/mail/data", "projects/mail/dvc.yaml:prepare"),
        (Path("/"), f"{root / 'data'}"[1:], f"{root / 'dvc.yaml'}"[1:] + ":prepare"),
        (ROOT, "data", "prepare"),
    ):
        monkeypatch.chdir(folder)
        assert (from_here(root, "data"), stage_from_here(root, "prepare")) == (data, stage)
        assert prepare_command(root) == f"dvc repro {stage}"
    assert from_here(root, "my rows") == "'my rows'"


def test_each_output_of_a_stage_has_a_name() -> None:
    assert outs() <= set(places(ROOT).values())


def test_every_artifact_is_in_an_output_of_a_stage() -> None:
    """DVC would neither keep nor restore another one."""
    artifacts = {path for path in places(ROOT).values() if ROOT / "artifacts" in path.parents}
    assert len(artifacts) > 20
    assert [path for path in artifacts if not outs() & {path, *path.parents}] == []


def test_dvc_deletes_no_checkpoint_and_no_report() -> None:
    """DVC deletes a stage's outputs before the stage starts."""
    found = Paths(ROOT)
    reports = (found.review, found.retraining_history, found.excluded, found.trusted, found.promotion, found.trials)
    for path in (found.checkpoints, *reports):
        assert not outs() & {path, *path.parents}, path


def test_of_the_outputs_git_keeps_the_metrics_alone() -> None:
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines() if line.startswith("/")]
    kept = {path for path in outs() if path.relative_to(ROOT).parts[0] not in ignored}
    assert kept == {Paths(ROOT).metrics}
    assert {"reports", "checkpoints"} <= set(ignored)
