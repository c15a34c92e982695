"""The tables of `peftcore status`, from the document that `--json` prints."""

from typing import Any

import pytest

from flows.commands.status import print_status

NOTHING: dict[str, Any] = {
    "name": "docstrings",
    "registry": {},
    "running": [],
    "last_run": None,
    "champion": None,
    "candidate": None,
    "looks": None,
    "retraining": {"last": None, "schedule": None},
    "disk": {"free": 5e9, "cache": 1_500_000, "checkpoints": 0, "worktrees": {}},
    "uncommitted": "",
    "hints": [],
    "next_step": "`peftcore run` makes the first version",
}


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """`shown(champion=...)`: what is printed, with these facts changed."""
    monkeypatch.setenv("COLUMNS", "200")

    def show(**facts: Any) -> str:
        print_status({**NOTHING, **facts})
        return capsys.readouterr().out

    return show


def test_a_new_project_is_told_in_words(shown: Any) -> None:
    text = shown()
    assert "docstrings: nothing is promoted yet" in text
    assert [line.split() for line in text.splitlines()][1:3] == [["running", "nothing"], ["last", "run", "none"]]
    assert "5.0 GB free, 1.5 MB cache, 0.0 MB checkpoints" in text
    assert "stage" not in text, "no table without stages"
    assert text.splitlines()[-1] == "next: `peftcore run` makes the first version"


def test_a_champion_without_a_record_is_shown(shown: Any) -> None:
    champion = {"version": "v0.1.0", "stage": "champion", "since": "monday", "test_loss": None}
    assert "v0.1.0 since monday, test loss unknown" in shown(champion=champion)


def test_each_fact_has_its_line(shown: Any) -> None:
    text = shown(
        registry={"champion": "v0.1.0", "shadow": None},
        running=[{"what": "run", "task": "train", "pid": 7}, {"what": "dvc", "task": None, "pid": 8}],
        last_run={"outcome": "failed", "failed_task": "merge", "finished": "today", "seconds": {"train": 2.04}},
        champion={"version": "v0.1.0", "stage": "champion", "since": "monday", "test_loss": 2.7004},
        candidate={"version": "v0.1.1", "verdict": "refused", "reason": "too slow"},
        looks={"in_words": "look 2: level 0.001; 0.048 of the budget of 0.05 is left"},
        retraining={
            "last": {"outcome": "kept", "finished": "then", "reason": "no gain"},
            "schedule": {"next": "soon", "cron": "0 3 * * 1", "timezone": "UTC"},
        },
    )
    for line in (
        "docstrings: champion is v0.1.0, shadow is a commit without a version",
        "run train (process 7); dvc (process 8)",
        "failed at merge, today; seconds train 2.0",
        "v0.1.0 since monday, test loss 2.700 nats",
        "look 2: level 0.001; 0.048 of the budget of 0.05 is left",
        "v0.1.1, refused: too slow",
        "kept then: no gain",
        "soon (0 3 * * 1, UTC)",
    ):
        assert line in text


def test_a_stage_lists_its_first_changes_and_counts_the_others(shown: Any) -> None:
    changes = [f"modified file{n}" for n in range(6)]
    lines = shown(stages={"fetch": [], "train": changes, "merge": changes[:4]}).splitlines()
    fetch, train, merge = (next(line for line in lines if f" {name} " in line) for name in ("fetch", "train", "merge"))
    assert "up to date" in fetch
    assert "modified file3 and 2 more" in train and "file4" not in train
    assert "modified file3" in merge and "more" not in merge


def test_what_looks_like_markup_is_printed_as_it_is(shown: Any) -> None:
    reason = "[red]slices[/]: [/] worse"
    candidate = {"version": "v0.1.1", "verdict": "refused", "reason": reason}
    text = shown(candidate=candidate, hints=["[bold]x[/]"], stages={"train": ["modified [/a]"]})
    assert reason in text and "[bold]x[/]" in text and "modified [/a]" in text


def test_working_trees_are_told_with_their_sizes(shown: Any) -> None:
    disk = {**NOTHING["disk"], "worktrees": {"/tmp/tree": 2e8}}
    assert "0.2 GB working tree /tmp/tree" in shown(disk=disk)


def test_uncommitted_files_are_named(shown: Any) -> None:
    text = shown(uncommitted="params.yaml (`git add params.yaml && git commit` includes them)")
    assert "uncommitted" in text and "`git add params.yaml && git commit`" in text
    assert "uncommitted" not in shown()
