"""Promotion: the gate's verdict becomes a tag, once, and only for what was compared with the present champion."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from made_up_results import suite_result
from webhook_receiver import receiving

from flows.errors import RegistryError, RepositoryError, StageError
from flows.gate.checks.evidence import MEANS, SIDES
from flows.gate.promote import OPTIONAL_COLUMNS, promote, read_promotion, roll_back
from flows.params import Params, load_suites
from flows.registry.registry import Registry, RegistryConflict
from flows.runtime.git import Git
from flows.webhooks.delivery import deliver
from peftcore.files import write_manifest


def champion(project: Any) -> str | None:
    holder = Registry(Git(project.root), "docstrings").stages().get("champion")
    return holder.version if holder else None


def test_the_first_good_version_becomes_champion_and_promoting_it_again_changes_nothing(registered: Any) -> None:
    first = promote(registered.params, registered.paths)
    assert (first.outcome, first.tag, champion(registered)) == ("promoted", "docstrings#champion#1", "v0.1.0")
    again = promote(registered.params, registered.paths)
    assert (again.outcome, again.tag) == ("already", None)
    assert again.report == first.report, "the stage's tag tells how it was judged"
    assert registered.git("tag", "--list").split() == ["docstrings#champion#1", "docstrings@v0.1.0"]
    assert read_promotion(registered.paths, "v0.1.0") == again
    assert read_promotion(registered.paths, "v0.1.1") is None


def test_a_better_version_takes_over_and_a_worse_one_does_not(registered: Any) -> None:
    promote(registered.params, registered.paths)
    registered.register(loss=2.6, weight=2.0)
    assert promote(registered.params, registered.paths, dry_run=True).outcome == "would promote"
    assert champion(registered) == "v0.1.0"
    assert promote(registered.params, registered.paths).outcome == "promoted"
    registered.register(loss=2.65, weight=3.0)
    refused = promote(registered.params, registered.paths)
    assert refused.outcome == "refused"
    assert not refused.accepted
    assert "loss +0.0500 nats against v0.1.1" in refused.sentence
    assert champion(registered) == "v0.1.1"
    assert read_promotion(registered.paths, "v0.1.2") == refused


def test_an_older_version_is_judged_by_its_own_files(project: Any) -> None:
    project.register(loss=2.5)
    project.register(loss=3.7, weight=2.0)
    assert promote(project.params, project.paths).outcome == "refused"
    promotion = promote(project.params, project.paths, version="v0.1.0")
    assert (promotion.outcome, promotion.version) == ("promoted", "v0.1.0")


@pytest.mark.slow
def test_a_rule_on_a_scorer_decides_with_the_champions_registered_scores(project: Any) -> None:
    with project.paths.params.open("a") as file:
        file.write("evaluate: {scorers: [token_f1]}\ngate:\n  rules: [{metric: token_f1, limit: 0.4, bound: 0.1}]\n")
    project.register(scores={"token_f1": (0.3, 0.6)})
    assert promote(project.params, project.paths).outcome == "promoted"
    project.register(loss=2.6, weight=2.0, scores={"token_f1": (0.3, 0.45)})
    refused = promote(project.params, project.paths)
    assert "token_f1 against the champion: token_f1 -0.1500 against v0.1.0 on 10 rows" in refused.sentence
    project.register(loss=2.6, weight=3.0, scores={"token_f1": (0.3, 0.55)})
    assert promote(project.params, project.paths).outcome == "promoted"
    project.register(loss=2.5, weight=4.0)
    assert "evaluated without the scorer token_f1 of the rules" in promote(project.params, project.paths).sentence


@pytest.mark.slow
def test_a_new_failure_of_a_suite_refuses_and_one_of_the_champion_too_does_not(project: Any) -> None:
    (project.root / "data").mkdir()
    prompts = ", ".join(f"{{id: {name}, prompt: Tell, must: [{{contain: x}}]}}" for name in "abc")
    (project.root / "data" / "support.yaml").write_text(f"prompts: [{prompts}]")
    with project.paths.params.open("a") as file:
        file.write("evaluate: {suites: [data/support.yaml]}\ngate: {max_new_suite_failures: 1}\n")
    params = project.params
    (suite,) = load_suites(params.evaluate, params.data.system_prompt, project.root).values()
    identity = suite.identity(project.root)

    def failing(*prompts: str) -> dict[str, Any]:
        return {"support": suite_result(dict.fromkeys(prompts, "it lacks 'x'"), identity)}

    project.register(suites=failing("a"))
    assert promote(params, project.paths).outcome == "promoted", "one failure is allowed"
    project.register(loss=2.6, weight=2.0, suites=failing("a", "b", "c"))
    refused = promote(params, project.paths)
    assert "suite support: 3 of 3 prompts fail, 2 of them new since v0.1.0, at most 1; new: b must" in refused.sentence
    assert "v0.1.0 fails too: a must contain 'x' [prompt: 'Tell <a>.'" in refused.sentence
    project.register(loss=2.6, weight=3.0, suites=failing("a", "b"))
    assert promote(params, project.paths).outcome == "promoted"
    project.register(loss=2.5, weight=4.0)
    assert "evaluated without the suite support of the rules" in promote(params, project.paths).sentence
    project.register(loss=2.5, weight=5.0, suites={"support": suite_result()})
    assert "with other prompts, settings or files of the suite support" in promote(params, project.paths).sentence
    project.register(loss=2.5, weight=6.0, suites=failing())
    project.paths.evaluation_suites.unlink()
    project.paths.evaluation_suites.write_text(json.dumps(failing("a")))
    assert "suites.json differs from the registered file" in promote(params, project.paths).sentence


@pytest.mark.faults("lost DVC cache or remote")
def test_the_champions_rows_come_from_the_remote_where_the_cache_is_gone(registered: Any) -> None:
    promote(registered.params, registered.paths)
    registered.register(loss=2.6, weight=2.0)
    cache = registered.root / ".dvc" / "cache"
    cache.rename(registered.root / ".dvc" / "gone")
    assert promote(registered.params, registered.paths).outcome == "promoted"


@pytest.mark.faults("corrupt remote object")
def test_a_corrupt_object_of_the_remote_is_noticed(registered: Any) -> None:
    promote(registered.params, registered.paths)
    registered.register(loss=2.6, weight=2.0)
    (registered.root / ".dvc" / "cache").rename(registered.root / ".dvc" / "gone")
    for path in (registered.root / ".dvc-remote").rglob("*"):
        if path.is_file() and not path.name.endswith(".dir"):
            path.chmod(0o644)
            path.write_bytes(b"corrupt")
    with pytest.raises(RegistryError, match=r"rows\.parquet of docstrings@v0\.1\.0 differs from the registered file"):
        promote(registered.params, registered.paths)
    assert champion(registered) == "v0.1.0"


@pytest.mark.faults("flipped bit, truncated file, NaN")
def test_an_adapter_changed_after_it_was_registered_is_refused(registered: Any) -> None:
    config = registered.paths.adapter / "adapter_config.json"
    config.unlink()  # a link into DVC's cache, perhaps
    config.write_text("{}")
    write_manifest(registered.paths.adapter)
    sentence = promote(registered.params, registered.paths).sentence
    assert "adapter_config.json differs from the registered file" in sentence
    assert champion(registered) is None


@pytest.fixture
def tag_reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Arguments of all git commands that list tags; reads of one tag's signature are not among them."""
    reads: list[tuple[str, ...]] = []
    run = Git.run

    def counted(git: Git, *arguments: str, **options: Any) -> str:
        listed = [one for one in arguments if one.startswith("refs/tags")]
        if arguments[0] in ("for-each-ref", "tag", "show-ref") and listed:
            reads.append(arguments)
        return run(git, *arguments, **options)

    monkeypatch.setattr(Git, "run", counted)
    return reads


def test_a_decision_reads_the_tags_once(registered: Any, tag_reads: list[tuple[str, ...]]) -> None:
    promote(registered.params, registered.paths)
    registered.register(loss=2.9, weight=2.0)
    tag_reads.clear()
    assert promote(registered.params, registered.paths, dry_run=True).outcome == "refused"
    assert promote(registered.params, registered.paths).outcome == "refused"
    assert len(tag_reads) == 2, "once for each decision"


def test_a_promotion_reads_the_tags_again_for_the_compare_and_swap_only(
    registered: Any, tag_reads: list[tuple[str, ...]]
) -> None:
    remote = registered.root.with_name("shared.git")
    registered.git("clone", "--quiet", "--bare", str(registered.root), str(remote))
    tag_reads.clear()
    assert promote(registered.params, registered.paths, push_to=str(remote)).outcome == "promoted"
    # the remote's tags are taken in; the decision; before the new tag: no other writer; after it: no mark of gc
    assert [len(read) for read in tag_reads] == [3, 6, 6, 3]
    (everything,) = {read[2:] for read in tag_reads if len(read) == 6}
    assert everything == tuple(f"refs/tags/{prefix}docstrings{rest}" for prefix, rest in
                               (("", "@*"), ("", "#*"), ("collected/", "/*"), ("approved/", "/*/*")))  # fmt: skip
    tag_reads.clear()
    assert promote(registered.params, registered.paths, push_to=str(remote)).outcome == "already"
    assert len(tag_reads) == 2, "the remote's tags were taken in, and the registry was read once after that"


def test_a_refused_version_s_tag_is_pushed_so_that_others_can_approve_it(registered: Any) -> None:
    remote = registered.root.with_name("shared.git")
    registered.git("init", "--quiet", "--bare", str(remote))
    params = registered.params.model_copy(update={"gate": registered.params.gate.model_copy(update={"approvals": 1})})
    assert promote(params, registered.paths, dry_run=True, push_to=str(remote)).outcome == "refused"
    assert registered.git("ls-remote", "--tags", str(remote)) == ""
    assert promote(params, registered.paths, push_to=str(remote)).outcome == "refused"
    assert "refs/tags/docstrings@v0.1.0\n" in registered.git("ls-remote", "--tags", str(remote))


def test_whoever_is_second_loses(registered: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry(Git(registered.root), "docstrings")
    monkeypatch.setattr(
        "flows.gate.promote.evaluate_gate",
        lambda *arguments: registry.assign("champion", registry.version("v0.1.0"), 0, "first") and GOOD,
    )
    with pytest.raises(RegistryConflict):
        promote(registered.params, registered.paths)
    assert registered.git("tag", "--list", "*champion*").split() == ["docstrings#champion#1"]


class _Good:
    passed = True
    checks = ()

    def as_dict(self) -> dict[str, Any]:
        return {}


GOOD = _Good()


def test_a_stage_given_by_hand_has_no_report(registered: Any) -> None:
    registered.git("tag", "--annotate", "--message=by hand", "docstrings#champion#1", "docstrings@v0.1.0^{}")
    promotion = promote(registered.params, registered.paths)
    assert (promotion.outcome, promotion.report) == ("already", None)


def test_nothing_registered_says_what_to_do(project: Any) -> None:
    with pytest.raises(StageError, match="no version was registered yet; use `peftcore run`"):
        promote(project.params, project.paths)


def test_a_version_without_its_tag_says_what_to_do(registered: Any) -> None:
    registered.git("tag", "--delete", "docstrings@v0.1.0")
    with pytest.raises(RegistryError, match=r"no version v0\.1\.0; there is: none yet.*registry fetch"):
        promote(registered.params, registered.paths)


def test_a_champion_whose_version_was_taken_back_cannot_be_compared_with(registered: Any) -> None:
    promote(registered.params, registered.paths)
    registered.git("tag", "--delete", "docstrings@v0.1.0")
    registered.register(loss=2.6, weight=2.0)
    with pytest.raises(RegistryError, match="git tag --delete 'docstrings#champion#1'"):
        promote(registered.params, registered.paths)


def test_the_result_is_plain_json(registered: Any) -> None:
    promotion = promote(registered.params, registered.paths, dry_run=True)
    assert json.loads(json.dumps(promotion.as_dict()))["report"]["passed"] is True
    assert not registered.paths.promotion.exists()


# -- slices and size -------------------------------------------------------------------------------------------------


def test_a_better_version_that_fails_a_slice_is_refused(registered: Any) -> None:
    promote(registered.params, registered.paths)
    worse = [0.9] * 12 + [-0.6] * 28
    registered.register(loss=2.4, weight=2.0, row_changes=worse, row_slices=["rare"] * 12 + ["common"] * 28)
    refused = promote(registered.params, registered.paths)
    assert refused.outcome == "refused" and champion(registered) == "v0.1.0"
    assert "slices: worse than v0.1.0 in rare" in refused.sentence and "on 12 rows" in refused.sentence


# -- rolling back ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def champions_template(template: Path, project_at: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository that each `champions` is a copy of, made once."""
    project = project_at(shutil.copytree(template, tmp_path_factory.mktemp("champions") / "project", symlinks=True))
    for loss in (2.7, 2.6, 2.5):
        project.register(loss=loss, weight=loss)
        assert promote(project.params, project.paths).outcome == "promoted"
    return project.root


@pytest.fixture
def champions(champions_template: Path, project_at: Any, tmp_path: Path) -> Any:
    """A project where v0.1.0, v0.1.1 and v0.1.2 became champion one after the other."""
    return project_at(shutil.copytree(champions_template, tmp_path / "project", symlinks=True))


def test_the_last_champion_comes_back_with_its_report_and_the_reason(champions: Any) -> None:
    back = roll_back(champions.params, champions.paths, "answers in\ncapitals")
    assert (back.outcome, back.version, back.tag) == ("rolled back", "v0.1.1", "docstrings#champion#4")
    assert champion(champions) == "v0.1.1" and back.accepted and back.sentence == "docstrings v0.1.1 is champion again"
    assert back.report is not None and back.report.version == "v0.1.1" and back.report.passed
    message = Registry(Git(champions.root), "docstrings").stages()["champion"].message
    assert "docstrings v0.1.1 becomes champion again, in place of v0.1.2" in message
    assert "Reason: answers in capitals" in message
    assert read_promotion(champions.paths, "v0.1.1") == back
    assert promote(champions.params, champions.paths, version="v0.1.1").outcome == "already"
    assert promote(champions.params, champions.paths, version="v0.1.1").report == back.report


def test_an_earlier_one_by_number_and_back_again(champions: Any) -> None:
    assert roll_back(champions.params, champions.paths, "why", "v0.1.0").version == "v0.1.0"
    assert roll_back(champions.params, champions.paths, "why", "v0.1.2").version == "v0.1.2"
    assert champion(champions) == "v0.1.2"


def test_two_rollbacks_go_back_twice(champions: Any) -> None:
    assert roll_back(champions.params, champions.paths, "v0.1.2 is wrong").version == "v0.1.1"
    assert roll_back(champions.params, champions.paths, "v0.1.1 too").version == "v0.1.0"
    with pytest.raises(RegistryError, match=r"lost the stage by a rollback.*v0\.1\.1, v0\.1\.2; .*--to VERSION"):
        roll_back(champions.params, champions.paths, "v0.1.0 too")
    assert roll_back(champions.params, champions.paths, "the best of them", "v0.1.2").version == "v0.1.2"


@pytest.mark.parametrize("to", [None, "v0.1.1"])
def test_a_rollback_that_was_killed_before_its_push_is_completed_and_not_undone(
    champions: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str | None
) -> None:
    class Killed(BaseException):
        pass

    def kill(*_: Any) -> None:
        raise Killed

    remote = tmp_path / "origin.git"
    champions.git("clone", "--quiet", "--bare", str(champions.root), str(remote))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Registry, "_push_or_delete", kill)
        roll_back(champions.params, champions.paths, "it swears", push_to=str(remote))
    assert champion(champions) == "v0.1.1" and "#4" not in champions.git("tag", root=remote)
    again = roll_back(champions.params, champions.paths, "it  swears", to, str(remote))
    assert (again.version, again.tag, champion(champions)) == ("v0.1.1", "docstrings#champion#4", "v0.1.1")
    assert champions.git("tag", root=remote) == champions.git("tag")
    assert read_promotion(champions.paths, "v0.1.1") == again
    assert roll_back(champions.params, champions.paths, "it swears", push_to=str(remote)).version == "v0.1.0"


def test_what_cannot_be_rolled_back_to_is_named(registered: Any) -> None:
    project = registered
    with pytest.raises(RegistryError, match="nothing is champion"):
        roll_back(project.params, project.paths, "why")
    promote(project.params, project.paths)
    with pytest.raises(RegistryError, match=r"no version was champion before v0\.1\.0, so .*; these were: none"):
        roll_back(project.params, project.paths, "why")
    project.register(loss=2.6, weight=2.0)
    promote(project.params, project.paths)
    with pytest.raises(RegistryError, match="needs a reason"):
        roll_back(project.params, project.paths, "  ")
    with pytest.raises(RegistryError, match=r"v0\.9\.0 was never champion.*these were: v0\.1\.0"):
        roll_back(project.params, project.paths, "why", "v0.9.0")
    assert champion(project) == "v0.1.1"


def test_a_damaged_version_does_not_come_back(champions: Any) -> None:
    (champions.root / ".dvc" / "cache").rename(champions.root / ".dvc" / "gone")
    for path in (champions.root / ".dvc-remote").rglob("*"):
        if path.is_file() and not path.name.endswith(".dir"):
            path.chmod(0o644)
            path.write_bytes(b"corrupt")
    with pytest.raises(RegistryError, match="differs from the registered file"):
        roll_back(champions.params, champions.paths, "why")
    assert champion(champions) == "v0.1.2"


def test_a_rolled_back_version_needs_an_explicit_act(champions: Any) -> None:
    """`peftcore run` with nothing changed judges the version of the last run, which was rolled back."""
    roll_back(champions.params, champions.paths, "wrong answers")
    refused = promote(champions.params, champions.paths)
    assert refused.outcome == "refused" and champion(champions) == "v0.1.1"
    assert "not withdrawn: docstrings#champion#4 rolled it back (wrong answers)" in refused.sentence
    write = champions.register(loss=2.45, weight=2.5)  # the same adapter, evaluated again
    assert write["version"] == "v0.1.3"
    assert "it has the adapter of v0.1.2: docstrings#champion#4" in promote(champions.params, champions.paths).sentence
    again = promote(champions.params, champions.paths, version="v0.1.2", again=True)
    assert again.outcome == "promoted" and champion(champions) == "v0.1.2"
    assert Registry(Git(champions.root), "docstrings").withdrawn("champion") == {}


def test_so_does_one_whose_stage_was_taken_back(registered: Any) -> None:
    promote(registered.params, registered.paths)
    registered.git("tag", "--annotate", "--message=bad", "docstrings#champion!#2", "docstrings@v0.1.0^{}")
    refused = promote(registered.params, registered.paths)
    assert "docstrings#champion!#2 withdrew champion" in refused.sentence
    assert promote(registered.params, registered.paths, again=True).outcome == "promoted"


# -- evidence --------------------------------------------------------------------------------------------------------


def test_an_edited_evaluation_makes_no_champion(project: Any) -> None:
    project.register(loss=3.7)
    assert "gain in loss: 0.100 nats" in promote(project.params, project.paths).sentence
    path = project.paths.evaluation_metrics
    metrics = json.loads(path.read_text())
    metrics["adapter"]["loss"], metrics["gain"]["loss"] = 2.0, 1.8
    path.unlink()  # a link into DVC's cache, perhaps
    path.write_text(json.dumps(metrics))
    refused = promote(project.params, project.paths)
    assert "evidence: metrics.json differs from the registered file of v0.1.0" in refused.sentence
    assert champion(project) is None


def test_an_adapter_that_is_evaluated_again_is_promoted_with_its_new_figures(registered: Any) -> None:
    promote(registered.params, registered.paths)
    registered.register(loss=2.75, weight=1.0)
    assert promote(registered.params, registered.paths).outcome == "promoted"
    registry = Registry(Git(registered.root), "docstrings")
    assert champion(registered) == "v0.1.1"
    assert registry.record(registry.version("v0.1.1"))["metrics"]["adapter"]["loss"] == 2.75


# -- the rules and the record ----------------------------------------------------------------------------------------


def test_what_the_rules_ask_for_has_to_be_measured(project: Any) -> None:
    """The judged version's author set the control set to null; the rules have one, and a limit on what it shows."""
    (project.root / "params.yaml").write_text(
        (project.root / "params.yaml").read_text() + "evaluate: {control: {source: null}}\n"
    )
    project.register(control=None)
    assert promote(project.params, project.paths, dry_run=True).outcome == "would promote"
    rules = Params.model_validate({"project": {"name": "docstrings"}, "register": {"remote": "local"}})
    refused = promote(rules, project.paths, version="v0.1.0")
    assert "evaluation settings: it was evaluated with evaluate.control.source null" in refused.sentence
    assert champion(project) is None


def test_a_tag_whose_record_is_of_another_version_is_no_version(registered: Any) -> None:
    promote(registered.params, registered.paths)
    registered.git("tag", "--annotate", "--message=x", "docstrings@v9.0.0", "docstrings@v0.1.0^{}")
    with pytest.raises(RegistryError, match=r"docstrings@v9\.0\.0 is at the commit of docstrings@v0\.1\.0"):
        promote(registered.params, registered.paths, version="v9.0.0")
    assert champion(registered) == "v0.1.0"


@pytest.fixture
def events(project: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """The events that a receiver of `project` got so far."""
    monkeypatch.setenv("PEFTCORE_WEBHOOK_SECRET", "a secret of twenty bytes")
    with receiving() as receiver:
        with project.paths.params.open("a") as file:
            file.write(f"webhooks: {{endpoints: [{{url: '{receiver.url}'}}]}}\n")
        yield lambda: list(receiver.accepted.values())


def test_each_verdict_is_announced_once(project: Any, events: Callable[[], list[dict[str, Any]]]) -> None:
    project.register()
    promote(project.params, project.paths, dry_run=True)
    promote(project.params, project.paths)
    promote(project.params, project.paths)
    project.register(loss=3.2, weight=2.0)
    promote(project.params, project.paths, dry_run=True)
    refused = promote(project.params, project.paths)
    promote(project.params, project.paths)  # the same refusal is one event
    project.register(loss=2.4, weight=3.0)
    promote(project.params, project.paths)
    roll_back(project.params, project.paths, "it swears")
    assert [(event["type"], event["data"]["version"]) for event in events()] == [
        ("candidate", "v0.1.0"),
        ("promotion", "v0.1.0"),
        ("candidate", "v0.1.1"),
        ("refusal", "v0.1.1"),
        ("candidate", "v0.1.2"),
        ("promotion", "v0.1.2"),
        ("rollback", "v0.1.0"),
    ]
    first, second, back = (event["data"] for event in events() if event["type"] in ("promotion", "rollback"))
    assert (first["tag"], first["previous"]) == ("docstrings#champion#1", None)
    assert (second["tag"], second["previous"]) == ("docstrings#champion#2", "v0.1.0")
    assert (back["tag"], back["previous"], back["reason"]) == ("docstrings#champion#3", "v0.1.2", "it swears")
    (refusal,) = (event["data"] for event in events() if event["type"] == "refusal")
    assert refusal["summary"] == refused.sentence and refusal["report"]["checks"]
    candidate = events()[0]["data"]
    assert candidate["tag"] == "docstrings@v0.1.0" and candidate["adapter"].startswith("sha256:")


def test_a_lost_race_is_no_promotion(
    project: Any, events: Callable[[], list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    project.register()
    original = Registry.assign

    def slower(self: Registry, stage: str, version: Any, last_event: int, message: str, push_to: str | None) -> str:
        original(self, stage, version, last_event, "another writer was faster\n")
        return original(self, stage, version, last_event, message, push_to)

    monkeypatch.setattr(Registry, "assign", slower)
    with pytest.raises(RegistryConflict):
        promote(project.params, project.paths)
    deliver(project.params, project.root, at_once=True)
    assert [event["type"] for event in events()] == ["candidate"]


def test_an_outbox_that_cannot_be_written_promotes_nothing(
    project: Any, events: Callable[[], list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    project.register()
    monkeypatch.setenv("PEFTCORE_OUTBOX", str(project.paths.params / "outbox"))
    with pytest.raises(RepositoryError, match="the outbox of webhooks"):
        promote(project.params, project.paths)
    assert champion(project) is None and not project.paths.promotion.exists()
    monkeypatch.delenv("PEFTCORE_OUTBOX")
    assert promote(project.params, project.paths).outcome == "promoted"
    assert [event["type"] for event in events()] == ["candidate", "promotion"]


def test_promotion_and_rollback_are_mirrored_after_their_tag(champions: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mirrored = []

    def mirror(params: Params, root: Path, record: dict[str, Any], adapter: Any) -> None:
        with adapter() as folder:
            mirrored.append((record["version"], champion(champions), (folder / "adapter_model.safetensors").exists()))

    monkeypatch.setattr("flows.gate.promote.mirror_promotion", mirror)
    roll_back(champions.params, champions.paths, "it swears")
    assert mirrored == [(champion(champions), champion(champions), True)]


def test_the_gate_reads_the_columns_from_which_figures_follow() -> None:
    columns = {*MEANS, "entities", "correct"} - {"entity_f1"}  # F1 follows from counts of entities
    assert {f"{side}_{column}" for side in SIDES for column in columns} <= set(OPTIONAL_COLUMNS)
