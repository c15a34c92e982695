"""A champion that was measured on other test rows: measured again on the candidate's, by the real evaluation."""

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pytest
import torch
from pyarrow import parquet

from flows.base.folder import load_tokenizer
from flows.base.model import load_dequantized, load_for_evaluation
from flows.data.chat import render
from flows.data.rows import read_rows
from flows.errors import RegistryError, StageError
from flows.evaluation.generation import generate_answers
from flows.evaluation.scoring import row_losses
from flows.gate import reevaluation
from flows.gate.candidate import Reevaluation
from flows.gate.promote import promote
from flows.params import Params, load_params, load_suites
from flows.paths import Paths
from flows.registry.reader import Version
from flows.registry.registered_files import dvc_digest
from flows.registry.registry import Registry
from flows.runtime.git import Git
from flows.runtime.project import dvc, files_at
from flows.runtime.worktree import worktree_at
from flows.stages import evaluate, prepare, register
from flows.stages.reevaluate import measure
from peftcore import LoraConfig, PeftModel, get_peft_model
from peftcore.files import sha256

PARAMS = """\
project: {name: docstrings}
data: {source: rows.jsonl, group_column: book, test_rows: 12, test_share: 0.3, validation_share: 0.15}
evaluate:
  rows: 10
  batch_size: 4
  generate_rows: 8
  max_new_tokens: 4
  samples: 1
  scorers: [{scorer: length, options: {unit: characters}}]
register: {remote: local}
gate:
  min_loss_gain: -10
  min_rouge_l_gain: -1
  min_eos_rate: 0
  champion: {max_loss_regression_on_its_rows: 9.0, max_loss_regression: 9.0}
  slices: {max_loss_regression: 9.0}
tracking: {mode: disabled}
"""
FIRST, SECOND = range(0, 60), range(30, 90)
"""Numbers whose sums the two versions are about."""


@pytest.fixture(scope="module")
def registered(
    template: Path, tmp_path_factory: pytest.TempPathFactory, write_tiny_base: Callable[[Path], Path]
) -> Path:
    """A repository whose v0.1.0 is champion and whose last run registered v0.2.0, which has other test rows."""
    parent = tmp_path_factory.mktemp("weeks")
    root = shutil.copytree(template, parent / "project", symlinks=True)
    dvc_yaml = root / "dvc.yaml"
    dvc_yaml.write_text(dvc_yaml.read_text().replace("artifacts/data,", "artifacts/data, artifacts/base,", 1))
    (root / "params.yaml").write_text(PARAMS)
    params, scratch = load_params(root / "params.yaml"), Paths(parent / "run")
    write_tiny_base(scratch.base)
    for numbers in (FIRST, SECOND):
        write_results_of(scratch, params, numbers)
        for name in ("adapter", "base", "data", "evaluation"):
            shutil.copytree(scratch.artifacts / name, root / "source" / name, dirs_exist_ok=True)
        dvc(root, "repro", "--quiet", "make")
        register.run(params, Paths(root))
        if numbers is FIRST:
            assert promote(params, Paths(root)).outcome == "promoted"
    return root


@pytest.fixture
def weeks(registered: Path, tmp_path: Path) -> Paths:
    """A copy of `registered` of one's own."""
    return Paths(Path(shutil.copytree(registered, tmp_path / "project", symlinks=True)))


def write_results_of(at: Paths, params: Params, numbers: range) -> None:
    """Prepared sums of these numbers, and an adapter of random weights, evaluated."""
    rows = [{"prompt": f"How much is {n} and 1?", "completion": f"{n + 1}.", "book": f"book{n // 4}"} for n in numbers]
    (at.root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare.run(params, at)
    torch.manual_seed(numbers.start)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(load_dequantized(at.base, params.quantization), config).save_pretrained(at.adapter)
    evaluate.run(params, at)


def champion_losses(params: Params, adapter: Path, base: Path, test: Path) -> dict[str, float]:
    """By hand: the loss of each of the first rows of `test` under an adapter."""
    rows = read_rows(test, limit=params.evaluate.rows)
    model = PeftModel.from_pretrained(load_for_evaluation(base, params.quantization), adapter)
    return dict(zip([r["id"] for r in rows], row_losses(model, rows, 0, params.evaluate.batch_size).means, strict=True))


def detail(promotion: Any) -> str:
    return {check.name: check.detail for check in promotion.report.checks}["against the champion"]


@pytest.mark.slow
def test_it_is_measured_on_the_new_rows_that_it_has_not_learned(
    weeks: Paths, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    params, found, there = load_params(weeks.params), list[Reevaluation](), list[Reevaluation]()

    def noted(*arguments: Any) -> Reevaluation:
        found.append(reevaluation.reevaluate_champion(*arguments))
        return found[-1]

    def noted_there(*arguments: Any) -> Reevaluation:
        there.append(reevaluation.reevaluate_candidate(*arguments))
        return there[-1]

    run = reevaluation._run
    # the champion in a process, as it is; the candidate in this one, which has imported everything
    monkeypatch.setattr(reevaluation, "_run", lambda task: (measure if task["version"] == "v0.2.0" else run)(task))
    monkeypatch.setattr("flows.gate.promote.reevaluate_champion", noted)
    monkeypatch.setattr("flows.gate.promote.reevaluate_candidate", noted_there)
    promotion = promote(params, weeks, dry_run=True)
    assert promotion.outcome == "would promote", promotion.sentence
    registry = Registry(Git(weeks.root), "docstrings")
    first = registry.version("v0.1.0").commit
    with files_at(weeks.root, first, ["artifacts/adapter", "artifacts/data"]) as folder:
        before = Paths(folder)
        expected = champion_losses(params, before.adapter, weeks.base, weeks.split("test"))
        splits = [parquet.read_table(before.split(split)).to_pylist() for split in ("train", "validation")]
        theirs = parquet.read_table(before.split("test")).to_pylist()[:10]
        on_theirs = champion_losses(params, weeks.adapter, weeks.base, before.split("test"))
    learned = {row["prompt"] for rows in splits for row in rows}
    rows = parquet.read_table(weeks.split("test")).to_pylist()[:10]
    kept = [row["id"] for row in rows if row["prompt"] not in learned]
    assert 0 < len(kept) < 10, "the test needs both kinds of rows"
    losses = dict(zip(*(found[0].rows.column(name).to_pylist() for name in ("id", "adapter_loss")), strict=True))
    assert losses == {name: pytest.approx(expected[name], abs=1e-6) for name in kept}
    assert f"on {len(kept)} rows" in detail(promotion)
    assert f"v0.1.0 was re-evaluated on these 10 test rows, without {10 - len(kept)} that" in detail(promotion)
    # and the candidate on the champion's
    ours = [parquet.read_table(weeks.split(split)).to_pylist() for split in ("train", "validation")]
    learned = {row["prompt"] for rows in ours for row in rows}
    new = [row["id"] for row in theirs if row["prompt"] not in learned]
    assert there[0].rows.column("id").to_pylist() == new and there[0].left_out == 10 - len(new)
    assert there[0].all_rows is not None
    losses = zip(*(there[0].all_rows.column(name).to_pylist() for name in ("id", "adapter_loss")), strict=True)
    assert dict(losses) == {row["id"]: pytest.approx(on_theirs[row["id"]], abs=1e-6) for row in theirs}
    checks = {check.name: check.detail for check in promotion.report.checks} if promotion.report else {}
    assert "on 10 test rows of v0.1.0" in checks["the champion's rows"]
    assert "evaluate v0.1.0 again" in capfd.readouterr().err


@pytest.mark.slow
def test_a_rule_lets_the_champion_answer_the_candidates_prompts(weeks: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = "{metric: length, direction: lower, bound: 999}"
    weeks.params.write_text(PARAMS.replace("gate:\n", f"gate:\n  rules: [{rule}]\n"))
    params, tasks, tables = load_params(weeks.params), dict[str, Any](), dict[str, pyarrow.Table]()

    def run(task: dict[str, Any]) -> pyarrow.Table:
        tasks[task["version"]], tables[task["version"]] = task, measure(task)
        return tables[task["version"]]

    monkeypatch.setattr(reevaluation, "_run", run)
    promotion = promote(params, weeks, dry_run=True)
    own = parquet.read_table(weeks.evaluation_rows)
    answered = [row["id"] for row in own.to_pylist() if row["adapter_length"] is not None]
    lengths = dict(zip(*(tables["v0.1.0"][name].to_pylist() for name in ("id", "adapter_length")), strict=True))
    assert [name for name, value in lengths.items() if value is not None] == answered and len(answered) == 8
    with files_at(
        weeks.root, Registry(Git(weeks.root), "docstrings").version("v0.1.0").commit, ["artifacts/adapter"]
    ) as at:
        model = PeftModel.from_pretrained(load_dequantized(weeks.base, params.quantization), Paths(at).adapter)
        rows = [row for row in read_rows(weeks.split("test"), limit=10) if row["id"] in answered]
        prompts = [row["input_ids"][: row["prompt_length"]] for row in rows]
        answers = generate_answers(model, load_tokenizer(weeks.base), prompts, 4, 4).answers
    assert [lengths[row["id"]] for row in rows] == [len(answer.text) for answer in answers]
    checks = {check.name: check.detail for check in promotion.report.checks} if promotion.report else {}
    assert "against v0.1.0 on" in checks["length against the champion"], promotion.sentence
    assert "v0.1.0 was re-evaluated on these 10 test rows" in checks["length against the champion"]
    assert "metrics" in tasks["v0.1.0"] and "metrics" not in tasks["v0.2.0"], "compared on the candidate's rows only"


@pytest.mark.slow
def test_the_champion_answers_the_suites_of_the_rules_in_a_process(weeks: Paths) -> None:
    (weeks.root / "data").mkdir(exist_ok=True)
    (weeks.root / "data" / "support.yaml").write_text("prompts: [{prompt: How much?, must: [{contain: zzz}]}]")
    weeks.params.write_text(PARAMS.replace("evaluate:\n", "evaluate:\n  suites: [data/support.yaml]\n"))
    params, registry = load_params(weeks.params), Registry(Git(weeks.root), "docstrings")
    version = registry.version("v0.1.0")
    candidate: Any = SimpleNamespace(metrics=json.loads(weeks.evaluation_metrics.read_text()))
    results = reevaluation.reevaluate_suites(params, weeks, registry, version, candidate)
    (prompt,) = results["support"]["prompts"]
    with files_at(weeks.root, version.commit, ["artifacts/adapter"]) as at:
        model = PeftModel.from_pretrained(load_dequantized(weeks.base, params.quantization), Paths(at).adapter)
        tokenizer = load_tokenizer(weeks.base)
        (suite,) = load_suites(params.evaluate, params.data.system_prompt, weeks.root).values()
        ids = tokenizer(render(tokenizer, suite.chat(suite.prompts[0]), generate=True), add_special_tokens=False)
        (answer,) = generate_answers(model, tokenizer, [ids["input_ids"]], 4, 4).answers
    assert prompt["answers"][0]["text"] == answer.text and prompt["answers"][0]["failed"]
    (weeks.root / "data" / "support.yaml").write_text("prompts: []")
    with pytest.raises(StageError, match=r"the re-evaluation of v0\.1\.0 failed: support\.yaml:1: prompts"):
        reevaluation.reevaluate_suites(params, weeks, registry, version, candidate)


@pytest.mark.slow
def test_the_judge_compares_answers_to_prompts_that_the_champion_has_not_learned(
    weeks: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reevaluation, "_run", measure)  # in this process, which has imported everything
    (weeks.root / "data").mkdir(exist_ok=True)
    calls = weeks.root / "calls"
    (weeks.root / "data" / "judge.py").write_text(
        "import json\n\n\ndef prefer(prompt, first, second, reference):\n"
        f"    open({str(calls)!r}, 'a').write(json.dumps(prompt) + '\\n')\n"
        "    return 'first' if first < second else 'second'\n"
    )
    judge = "gate:\n  judge: {callable: 'data/judge.py:prefer', margin: 0.49}\n"
    weeks.params.write_text(PARAMS.replace("gate:\n", judge))
    params = load_params(weeks.params)
    first = promote(params, weeks, dry_run=True)
    assert first.report is not None
    (check,) = [one for one in first.report.checks if one.name == "judge"]
    assert "without a readable verdict" not in check.detail and "was re-evaluated on these 10 test rows" in check.detail
    rows = json.loads(weeks.judgement.read_text())["rows"]
    test = {row["id"]: row for row in read_rows(weeks.split("test"), limit=10)}
    table = parquet.read_table(weeks.evaluation_rows, columns=["id", "adapter_answer"]).to_pylist()
    answers = {row["id"]: row["adapter_answer"] for row in table}
    assert rows and all(row["candidate"] == answers[row["id"]] for row in rows)
    assert all(row["prompt"] == test[row["id"]]["prompt"] for row in rows)
    for row in rows:
        one, other = row["candidate"], row["champion"]
        assert row["outcome"] == ("equal" if one == other else "won" if one < other else "lost")
    asked = calls.read_text()
    assert asked.count("\n") == 2 * sum(row["outcome"] != "equal" for row in rows) > 0
    again = promote(params, weeks)
    assert again.report == first.report and calls.read_text() == asked, "the verdicts come from the cache"
    if again.tag is not None:
        tag = Git(weeks.root).run("tag", "--list", "--format=%(contents)", again.tag)
        assert '"callable": "data/judge.py:prefer"' in tag and sha256(weeks.judgement) in tag


@pytest.mark.proof
def test_a_measurement_that_fails_says_why(weeks: Paths) -> None:
    (weeks.base / "config.json").unlink()
    with pytest.raises(StageError, match=r"the re-evaluation of v0\.1\.0 failed: .*config\.json is damaged or missing"):
        promote(load_params(weeks.params), weeks)


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The tasks that would be measured, with digests of their files; every row then has a loss of 1 nat."""
    tasks: list[dict[str, Any]] = []

    def run(task: dict[str, Any]) -> pyarrow.Table:
        files = ("base", "model.safetensors"), ("adapter", "adapter_model.safetensors"), ("test", "")
        tasks.append(task | {name: sha256(Path(task[name]) / file) for name, file in files})
        ids = [row["id"] for row in read_rows(Path(task["test"]), ["id"], task["rows"])]
        return pyarrow.table({"id": ids, "tokens": [1] * len(ids), "adapter_loss": [1.0] * len(ids)})

    monkeypatch.setattr(reevaluation, "_run", run)
    return tasks


@pytest.mark.slow
def test_a_working_tree_without_any_files_measures_the_same(weeks: Paths, pretended: list[dict[str, Any]]) -> None:
    params = load_params(weeks.params)
    here = promote(params, weeks, dry_run=True)
    with worktree_at(weeks.root, "HEAD") as tree:
        assert not (tree / "artifacts").exists()
        there = promote(params, Paths(tree), version="v0.2.0")
    assert (there.outcome, detail(there)) == ("promoted", detail(here))
    assert [task["version"] for task in pretended] == ["v0.1.0", "v0.2.0"] * 2
    assert pretended[:2] == pretended[2:]


@pytest.mark.slow
def test_unless_it_may_be_it_is_refused(weeks: Paths, pretended: list[dict[str, Any]]) -> None:
    weeks.params.write_text(PARAMS.replace("9.0}", "9.0, reevaluate: false}", 1))
    refused = promote(load_params(weeks.params), weeks)
    assert "v0.1.0 was evaluated on another test set" in refused.sentence
    assert pretended == []


def test_test_rows_of_another_run_are_refused(weeks: Paths, pretended: list[dict[str, Any]]) -> None:
    replace_file(weeks.split("test"), weeks.split("train").read_bytes())
    with pytest.raises(StageError, match=r"differs from the test rows that v0\.2\.0 was evaluated on"):
        promote(load_params(weeks.params), weeks)
    assert pretended == []


def test_data_that_are_not_what_was_registered_are_refused(weeks: Paths, pretended: list[dict[str, Any]]) -> None:
    """With other training rows, others would be left out."""
    registry = Registry(Git(weeks.root), "docstrings")
    digest = registry.record(registry.version("v0.2.0"))["dvc"]["artifacts/data"]
    assert dvc_digest(weeks.data) == digest, "as DVC computes it"
    digest = registry.record(registry.version("v0.1.0"))["dvc"]["artifacts/data"]
    cache = weeks.root / ".dvc" / "cache" / "files" / "md5"
    listed = json.loads((cache / digest[:2] / digest[2:]).read_text())
    train = next(one["md5"] for one in listed if one["relpath"] == "train.parquet")
    replace_file(cache / train[:2] / train[2:], weeks.split("validation").read_bytes())
    with pytest.raises(RegistryError, match=r"artifacts/data of docstrings@v0\.1\.0 differs from the registered file"):
        promote(load_params(weeks.params), weeks)
    assert pretended == []


def replace_file(path: Path, content: bytes) -> None:
    path.unlink()  # a link into DVC's cache, perhaps
    path.write_bytes(content)


# -- which rows it has learned, without a repository -----------------------------------------------------------------


def prepared_rows(folder: Path, texts: dict[str, list[str]], column: str = "prompt") -> Paths:
    paths = Paths(folder)
    paths.data.mkdir(parents=True)
    for split in ("train", "validation", "test"):
        rows = {"id": [f"{folder.name}-{text}" for text in texts.get(split, [])], column: texts.get(split, [])}
        parquet.write_table(pyarrow.table(rows), paths.data / f"{split}.parquet")
    return paths


class Versions:
    """A registry of records alone."""

    def __init__(self, started_from: dict[str, str | None]) -> None:
        self.started_from = started_from

    def version(self, number: str) -> str:
        return number

    def record(self, number: str) -> dict[str, Any]:
        return {"params": {"train": {"start_from": self.started_from[number]}}}


def test_what_it_started_from_has_taught_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = {
        number: prepared_rows(tmp_path / number, {"train": [f"train {number}"], "validation": [f"val {number}"]})
        for number in ("v0.1.0", "v0.2.0", "v0.3.0")
    }
    monkeypatch.setattr(reevaluation, "files_of", lambda paths, registry, number, wanted: nullcontext(data[number]))
    registry: Any = Versions({"v0.3.0": "v0.2.0", "v0.2.0": "v0.1.0", "v0.1.0": None})
    found = list(reevaluation.data_of(data["v0.3.0"], registry, registry.version("v0.3.0"), data["v0.3.0"]))
    assert [paths.root.name for paths in found] == ["v0.3.0", "v0.2.0", "v0.1.0"]
    known = reevaluation.learned(found[0]) | reevaluation.learned(found[2])
    assert {"train v0.3.0", "val v0.3.0", "train v0.1.0", "val v0.1.0", "v0.1.0-val v0.1.0"} <= known


def test_a_reranker_ranks_the_passages_of_the_evaluation_that_it_is_compared_with(tmp_path: Path) -> None:
    """Two passages are an easier task than five, so both versions have to rank those of one evaluation."""
    given = {"data": {"source": "data/a.jsonl", "kind": "retrieval"}, "train": {"objective": "reranker"}}
    records = {}
    for number, seed, negatives in (("v0.1.0", 1, 4), ("v0.2.0", 2, 8)):
        train = given["train"] | {"reranker": {"negatives": negatives}, "learning_rate": seed * 1e-4}
        params = Params.model_validate(given | {"project": {"seed": seed}, "train": train})
        records[Version(number, f"docstrings@{number}", "0", 0, "")] = {"params": params.model_dump()}
    champion, candidate = records
    registry: Any = SimpleNamespace(record=records.__getitem__)
    of_champion, of_both = (
        reevaluation._task(Params(), registry, champion, tmp_path, tmp_path, tmp_path, 9, None, rows)["params"]
        for rows in (champion, candidate)
    )
    assert (of_champion["train"]["reranker"]["negatives"], of_champion["project"]["seed"]) == (4, 1)
    assert (of_both["train"]["reranker"]["negatives"], of_both["project"]["seed"]) == (8, 2)
    assert of_both["train"]["learning_rate"] == 1e-4, "everything else is the champion's own"


def test_a_classified_text_is_what_is_asked(tmp_path: Path) -> None:
    assert "cold" in reevaluation.learned(prepared_rows(tmp_path / "a", {"train": ["cold"]}, "text"))
    typed = prepared_rows(tmp_path / "b", {"train": ["\u201ccold\u201d"]}, "text")
    assert '"cold"' in reevaluation.learned(typed), "in the spelling in which rows are compared"
    (tmp_path / "a" / "artifacts" / "data" / "train.parquet").write_bytes(b"no table")
    with pytest.raises(StageError, match=r"train\.parquet cannot be read as prepared rows"):
        reevaluation.learned(Paths(tmp_path / "a"))
