"""evaluate: base and adapter on the same rows, by the same weights, to figures that add up."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from flows.base.identity import base_identity
from flows.errors import ParamsError, StageError
from flows.evaluation.scoring import row_losses
from flows.params import Params
from flows.paths import Paths
from flows.registry.lineage import evidence
from flows.stages import evaluate
from flows.stages.reevaluate_benchmarks import measure
from peftcore import CheckpointError
from peftcore.files import sha256, write_manifest


def metrics_of(paths: Paths) -> dict[str, Any]:
    return json.loads(paths.evaluation_metrics.read_text())


def rows_of(paths: Paths) -> list[dict[str, Any]]:
    return parquet.read_table(paths.evaluation_rows).to_pylist()


@pytest.fixture(scope="module")
def evaluated_template(
    trained_template: Path, tiny_params: Callable[..., Params], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder that each `evaluated` is a copy of, made once."""
    root = shutil.copytree(trained_template, tmp_path_factory.mktemp("evaluated") / "project")
    evaluate.run(tiny_params(), Paths(root))
    return root


@pytest.fixture
def evaluated(evaluated_template: Path, tmp_path: Path) -> Paths:
    """`trained`, and its adapter evaluated."""
    return Paths(shutil.copytree(evaluated_template, tmp_path, dirs_exist_ok=True))


def test_figures_are_of_all_test_rows_and_add_up(evaluated: Paths) -> None:
    metrics, rows = metrics_of(evaluated), rows_of(evaluated)
    test = parquet.read_table(evaluated.split("test")).to_pylist()
    assert [row["id"] for row in rows] == [row["id"] for row in test]
    assert [row["tokens"] for row in rows] == [sum(label != -100 for label in row["labels"]) for row in test]
    for name in ("base", "adapter"):
        total = sum(row[f"{name}_loss"] * row["tokens"] for row in rows)
        expected = total / sum(row["tokens"] for row in rows)
        assert metrics[name]["loss"] == pytest.approx(expected, rel=1e-9)
        assert metrics[name]["perplexity"] == pytest.approx(math.exp(expected), rel=1e-9)
        assert metrics[name]["tokens_per_second"] > 0
    assert metrics["gain"]["loss"] == metrics["base"]["loss"] - metrics["adapter"]["loss"] > 0
    assert metrics["gain"]["rouge_l"] == metrics["adapter"]["rouge_l"] - metrics["base"]["rouge_l"]
    assert (metrics["rows"], metrics["generated_rows"]) == (12, 6)
    assert metrics["evaluation_set"] == sha256(evaluated.split("test"))
    assert metrics["base_manifest"] == sha256(evaluated.base / "SHA256SUMS")
    assert metrics["base_model"] == base_identity(evaluated.base)
    assert sum(one["rows"] for one in metrics["slices"].values()) == 12
    for name, one in metrics["slices"].items():
        mine = [row for row in rows if row["slice"] == name]
        total = sum(row["adapter_loss"] * row["tokens"] for row in mine)
        assert one["adapter_loss"] == pytest.approx(total / sum(row["tokens"] for row in mine), rel=1e-9)


def test_answers_are_of_the_sampled_rows_alone(evaluated: Paths) -> None:
    rows = rows_of(evaluated)
    answered = [row for row in rows if row["base_answer"] is not None]
    assert len(answered) == 6
    names = ("reference", "adapter_answer", "base_rouge_l", "adapter_rouge_l", "base_ended", "adapter_ended")
    for row in rows:
        assert all((row[name] is None) == (row["base_answer"] is None) for name in names)
    mean = sum(row["adapter_rouge_l"] for row in answered) / 6
    assert metrics_of(evaluated)["adapter"]["rouge_l"] == pytest.approx(mean)
    samples = json.loads(evaluated.samples.read_text())
    assert [sample["id"] for sample in samples] == [row["id"] for row in answered[:3]]
    assert samples[0].keys() == {"id", "slice", "prompt", "reference", "base", "adapter"}
    assert samples[0]["reference"] == answered[0]["reference"]


def test_the_base_is_judged_on_the_weights_that_training_saw(evaluated: Paths, tiny_params) -> None:
    quantised = metrics_of(evaluated)["base"]["loss"]
    evaluate.run(tiny_params(quantization={"storage": "none"}), evaluated)
    plain = metrics_of(evaluated)["base"]["loss"]
    model = AutoModelForCausalLM.from_pretrained(evaluated.base, dtype=torch.bfloat16).eval()
    test = parquet.read_table(evaluated.split("test")).to_pylist()
    assert plain == pytest.approx(row_losses(model, test, 0, 4).loss, rel=1e-6)
    assert quantised != plain


def test_an_adapter_for_another_base_is_refused(trained: Paths, tiny_params, tokenizer) -> None:
    other = LlamaConfig(vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    shutil.rmtree(trained.base)
    LlamaForCausalLM(other).bfloat16().save_pretrained(trained.base)
    tokenizer.save_pretrained(trained.base)
    write_manifest(trained.base)
    with pytest.raises(CheckpointError, match="another base"):
        evaluate.run(tiny_params(), trained)
    assert not trained.evaluation.exists()


@pytest.mark.faults("flipped bit, truncated file, NaN")
@pytest.mark.parametrize("damage", ["flip", "truncate", "pickle"])
def test_a_damaged_or_unsafe_adapter_is_refused_and_the_old_results_stay(
    evaluated: Paths, tiny_params, damage: str
) -> None:
    before = evaluated.evaluation_metrics.read_bytes()
    file: Path = evaluated.adapter / "adapter_model.safetensors"
    data = file.read_bytes()
    if damage == "pickle":
        file.rename(evaluated.adapter / "adapter_model.bin")
    else:
        file.write_bytes(data[:-4] if damage == "truncate" else data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="adapter_model"):
        evaluate.run(tiny_params(), evaluated)
    assert evaluated.evaluation_metrics.read_bytes() == before


def test_without_test_rows_the_stage_says_what_to_run(trained: Paths, tiny_params) -> None:
    trained.split("test").unlink()
    with pytest.raises(StageError, match="prepare"):
        evaluate.run(tiny_params(), trained)


def with_weights(paths: Paths, weigh: Callable[[str], float]) -> None:
    """Give each test row a slice, a or b in turn, and the weight of its slice."""
    table = parquet.read_table(paths.split("test"))
    slices = ["ab"[row % 2] for row in range(table.num_rows)]
    for name, values in (("slice", slices), ("weight", [weigh(one) for one in slices])):
        column = pa.array(values, table.schema.field(name).type)
        table = table.set_column(table.column_names.index(name), table.schema.field(name), column)
    parquet.write_table(table, paths.split("test"))


def test_a_slice_of_weight_0_has_no_loss_and_metrics_stay_json(
    trained: Paths, tiny_params, caplog: pytest.LogCaptureFixture
) -> None:
    with_weights(trained, lambda name: float(name == "a"))
    evaluate.run(tiny_params(), trained)
    text = trained.evaluation_metrics.read_text()
    slices = json.loads(text, parse_constant=pytest.fail)["slices"]
    assert slices["b"]["rows"] > 0 and slices["b"]["base_loss"] is None and slices["b"]["adapter_loss"] is None
    assert slices["a"]["base_loss"] == pytest.approx(metrics_of(trained)["base"]["loss"])
    assert "slices without a test loss, because all their rows have weight 0: b" in caplog.text


def test_test_rows_of_weight_0_are_refused_before_the_model_is_loaded(trained: Paths, tiny_params) -> None:
    with_weights(trained, lambda name: 0.0)
    shutil.rmtree(trained.adapter)
    with pytest.raises(StageError, match=r"all \d+ test rows to evaluate have weight 0.*give some of them a weight"):
        evaluate.run(tiny_params(), trained)


def test_forgetting_and_latency_are_measured_of_a_model_that_writes(trained: Paths, tiny_params) -> None:
    params = tiny_params(evaluate={"control": {"rows": 5, "max_length": 32}, "latency_rows": 2})
    evaluate.run(params, trained)
    metrics, rows = metrics_of(trained), parquet.read_table(trained.evaluation_control).to_pylist()
    assert [row["tokens"] for row in rows] == [31] * 5
    for name in ("base", "adapter"):
        mean = sum(row[f"{name}_loss"] for row in rows) / 5
        assert metrics["control"][f"{name}_loss"] == pytest.approx(mean, rel=1e-9)
        assert metrics["latency"][name].keys() == {"first_token_ms", "token_ms"}
    assert metrics["control"]["rows"] == 5
    assert trained.evaluation_control in evidence(trained)
    evaluate.run(tiny_params(evaluate={"control": {"source": None}, "latency_rows": 0}), trained)
    assert (metrics_of(trained)["control"], metrics_of(trained)["latency"]) == (None, None)
    assert not trained.evaluation_control.exists()
    assert trained.evaluation_control not in evidence(trained)


SCORERS = """\
def vowels(prompt, answer, reference, row):
    return sum(letter in "aeiou" for letter in answer)

def known(prompt, answer, reference, row):
    return reference in prompt or len(row["id"])
"""


def test_scorers_add_columns_and_leave_the_other_figures_alone(evaluated: Paths, tiny_params) -> None:
    before, rows_before = metrics_of(evaluated), rows_of(evaluated)
    (evaluated.root / "data").mkdir(exist_ok=True)
    (evaluated.root / "data" / "my.py").write_text(SCORERS)
    scorers = [{"scorer": "length", "options": {"unit": "characters"}}, "data/my.py:vowels", "data/my.py:known"]
    evaluate.run(tiny_params(evaluate={"scorers": scorers}), evaluated)
    metrics, rows = metrics_of(evaluated), rows_of(evaluated)
    for side in ("base", "adapter"):
        answers = [row[f"{side}_answer"] for row in rows]
        lengths = [None if answer is None else len(answer) for answer in answers]
        assert [row[f"{side}_length"] for row in rows] == lengths and lengths.count(None) == 6
        vowels = [sum(map(answer.count, "aeiou")) for answer in answers if answer is not None]
        assert metrics[side]["vowels"] == pytest.approx(sum(vowels) / 6)
        assert metrics[side]["known"] == len(rows[0]["id"])
    assert metrics["scorers"]["vowels"]["files"] == {"data/my.py": sha256(evaluated.root / "data" / "my.py")}
    changed = set(metrics) - set(before)
    assert changed == {"scorers"}
    for part in ("base", "adapter"):
        timed = {"tokens_per_second"}
        assert {name: metrics[part][name] for name in set(before[part]) - timed} == {
            name: before[part][name] for name in set(before[part]) - timed
        }
    assert [{name: row[name] for name in rows_before[0]} for row in rows] == rows_before


def test_a_scorer_that_is_missing_stops_before_the_model_is_loaded(
    evaluated: Paths, tiny_params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "load_for_evaluation", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(StageError, match=r"data/no\.py cannot be read"):
        evaluate.run(tiny_params(evaluate={"scorers": ["data/no.py:score"]}), evaluated)


SUITE = """\
prompts:
  - {id: sum, prompt: How much is 1 and 1?, must: [{contain: "zzz"}, {not_leak: ACME-4711}]}
  - {id: none, prompt: Say nothing., must: [{score: {scorer: length, at_least: 0}}]}
"""


def test_suites_are_answered_by_the_adapter_and_leave_the_other_figures_alone(evaluated: Paths, tiny_params) -> None:
    before, rows_before = metrics_of(evaluated), evaluated.evaluation_rows.read_bytes()
    assert not evaluated.evaluation_suites.exists()
    (evaluated.root / "data").mkdir(exist_ok=True)
    (evaluated.root / "data" / "support.yaml").write_text(SUITE)
    evaluate.run(tiny_params(evaluate={"suites": ["data/support.yaml"]}), evaluated)
    metrics, results = metrics_of(evaluated), json.loads(evaluated.evaluation_suites.read_text())
    figures = {"prompts": 2, "failed": 1, "pass_rate": 0.5, "pass_at": 1}
    assert metrics["suites"] == {"support": figures | {key: results["support"][key] for key in ("content", "files")}}
    assert results["support"]["prompts"][0]["answers"][0]["failed"] == {"0": "must contain 'zzz': it lacks 'zzz'"}
    assert set(metrics) - set(before) == {"suites"} and evaluated.evaluation_rows.read_bytes() == rows_before
    assert evaluated.evaluation_suites in evidence(evaluated)
    evaluate.run(tiny_params(), evaluated)
    assert not evaluated.evaluation_suites.exists() and "suites" not in metrics_of(evaluated)


def test_a_wrong_suite_stops_before_the_model_is_loaded(
    evaluated: Paths, tiny_params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "load_for_evaluation", lambda *_: pytest.fail("the model was loaded"))
    (evaluated.root / "data").mkdir(exist_ok=True)
    (evaluated.root / "data" / "support.yaml").write_text(SUITE.replace("contain", "contian", 1))
    params = tiny_params(evaluate={"suites": ["data/support.yaml"]})
    with pytest.raises(ParamsError, match=r"support\.yaml:2: .*contian: unknown key; did you mean contain\?"):
        evaluate.run(params, evaluated)
    (evaluated.root / "data" / "support.yaml").write_text(SUITE.replace('contain: "zzz"', 'match: "("'))
    with pytest.raises(StageError, match=r"evaluate\.suites: must match '\('"):
        evaluate.run(params, evaluated)


@pytest.mark.slow
def test_benchmarks_have_figures_of_base_and_adapter(
    evaluated: Paths, tiny_params, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra benchmarks)")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    (evaluated.root / "data").mkdir(exist_ok=True)
    rows = [{"q": f"{n} and 1?", "choices": [f"{n + 1}", f"{n}"], "answer": n % 2} for n in range(8)]
    (evaluated.root / "data" / "quiz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (evaluated.root / "data" / "quiz.yaml").write_text(
        "task: quiz\ndataset_path: json\ndataset_kwargs: {data_files: {test: data/quiz.jsonl}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: choices\ndoc_to_target: answer\n"
        "metric_list: [{metric: acc}]\n"
    )
    before = metrics_of(evaluated)
    evaluate.run(tiny_params(evaluate={"benchmarks": [{"task": "data/quiz.yaml", "limit": 6}]}), evaluated)
    metrics = metrics_of(evaluated)
    assert set(metrics) - set(before) == {"benchmarks"}
    quiz = metrics["benchmarks"]["quiz"]
    assert (quiz["base"]["rows"], quiz["adapter"]["metric"], quiz["identity"]["limit"]) == (6, "acc,none", 6)
    assert len(list(evaluated.benchmark_cache.iterdir())) == 2
    task = {"params": tiny_params(evaluate={"benchmarks": [{"task": "data/quiz.yaml", "limit": 6}]}).model_dump()}
    places = {"base": str(evaluated.base), "adapter": str(evaluated.adapter), "root": str(evaluated.root)}
    again = measure(task | places)
    assert again == {"quiz": {key: quiz[key] for key in ("identity", "adapter")}}
    assert len(list(evaluated.benchmark_cache.iterdir())) == 2, "from the cache"


def test_calibration_is_of_the_tokens_of_the_first_rows(evaluated: Paths, tiny_params) -> None:
    before = metrics_of(evaluated)
    evaluate.run(tiny_params(evaluate={"calibration_rows": 5}), evaluated)
    metrics = metrics_of(evaluated)
    assert set(metrics) - set(before) == {"calibration"}
    tokens = sum(row["tokens"] for row in rows_of(evaluated)[:5])
    for side in ("base", "adapter"):
        figures = metrics["calibration"][side]
        assert figures["predictions"] == tokens
        assert sum(one["share"] for one in figures["bins"]) == pytest.approx(1)
    assert metrics["calibration"]["base"] != metrics["calibration"]["adapter"]
