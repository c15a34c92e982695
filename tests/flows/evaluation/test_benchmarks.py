"""Benchmarks on the live model, against the harness's own way to evaluate an adapter of HF PEFT."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import HubServer

from flows.base.folder import load_tokenizer
from flows.base.model import load_dequantized
from flows.errors import StageError
from flows.evaluation import benchmarks
from flows.evaluation.benchmarks import Harness, model_digests
from flows.params import Benchmark, Quantization
from peftcore import LoraConfig, PeftModel, get_peft_model
from peftcore.files import write_manifest

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra benchmarks)")

QUIZ = """\
task: quiz
dataset_path: json
dataset_kwargs: {data_files: {test: data/quiz.jsonl, train: data/quiz.jsonl}}
output_type: multiple_choice
training_split: train
test_split: test
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
PLAIN = Quantization(storage="none")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a task of twelve questions, without a network."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "quiz.yaml").write_text(QUIZ)
    rows = [{"question": f"{n} and 1?", "choices": [f"{n + 1}", f"{n}", "none"], "answer": n % 3} for n in range(12)]
    (tmp_path / "data" / "quiz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.fixture
def adapter(tiny_base: Path, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(load_dequantized(tiny_base, PLAIN), config).save_pretrained(tmp_path / "adapter")
    write_manifest(tmp_path / "adapter")
    return tmp_path / "adapter"


def quiz(**values: Any) -> Benchmark:
    return Benchmark.model_validate({"task": "data/quiz.yaml", **values})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of the harness's own way to load a model
def test_figures_are_those_of_the_harness_with_the_adapter_in_hf_peft(
    root: Path, tiny_base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    model, tokenizer = PeftModel.from_pretrained(load_dequantized(tiny_base, PLAIN), adapter), load_tokenizer(tiny_base)
    entries = [quiz(num_fewshot=2, limit=10, metric="acc_norm")]
    measured: dict[str, Any] = {}
    for side, folder in (("adapter", adapter), ("base", None)):
        with model.disable_adapter() if folder is None else torch.no_grad():
            digests = model_digests("b", PLAIN, folder)
            measured[side] = Harness(entries, root).measure(model, tokenizer, 4, root / "kept", digests)["quiz"]
    monkeypatch.chdir(root)  # the task's files are relative to the working directory of lm_eval
    for side, peft in (("adapter", f",peft={adapter}"), ("base", "")):
        told = simple_evaluate(
            model="hf",
            model_args=f"pretrained={tiny_base}{peft},device=cpu",
            tasks=[str(root / "data" / "quiz.yaml")],
            num_fewshot=2,
            limit=10,
            batch_size=4,
            task_manager=TaskManager(include_defaults=False),
        )["results"]["quiz"]
        assert measured[side]["value"] == told["acc_norm,none"]
        assert measured[side]["stderr"] == pytest.approx(told["acc_norm_stderr,none"], rel=1e-12)
        assert (measured[side]["metric"], measured[side]["rows"], measured[side]["higher"]) == (
            "acc_norm,none",
            10,
            True,
        )


def test_an_unchanged_model_is_measured_once(
    root: Path, tiny_base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def evaluated(self: Harness, benchmark: Benchmark, model: Any) -> dict[str, Any]:
        calls.append(benchmark.name)
        return {"value": len(calls)}

    monkeypatch.setattr(Harness, "_evaluate", evaluated)
    monkeypatch.setattr(Harness, "_language_model", lambda *_: "model")

    def measured(base: str = "b", folder: Path | None = adapter, **values: Any) -> Any:
        harness = Harness([quiz(**values)], root)
        return harness.measure(None, None, 4, root / "kept", model_digests(base, PLAIN, folder))["quiz"]["value"]

    assert [measured(), measured(), measured(folder=None), measured("c"), measured(limit=3), measured()] == [
        1,
        1,
        2,
        3,
        4,
        1,
    ]
    (root / "data" / "quiz.jsonl").write_text((root / "data" / "quiz.jsonl").read_text().replace("and", "plus"))
    assert measured() == 5, "the questions are others"
    (adapter / "adapter_config.json").write_text("{}")
    write_manifest(adapter)
    assert measured() == 6, "the adapter is another one"


def test_a_task_whose_data_cannot_be_found_offline_is_named(root: Path) -> None:
    (root / "data" / "far.yaml").write_text(QUIZ.replace("dataset_path: json", "dataset_path: nobody/nothing"))
    with pytest.raises(
        StageError, match=r"evaluate\.benchmarks, data/far\.yaml: the task or its data cannot be loaded"
    ):
        Harness([Benchmark(task="data/far.yaml")], root)
    with pytest.raises(StageError, match=r"data/no\.yaml: the file cannot be read; create it"):
        Harness([Benchmark(task="data/no.yaml")], root)


@pytest.mark.slow
def test_an_unknown_task_of_the_harness_is_told_the_nearest_one(root: Path) -> None:
    with pytest.raises(StageError, match=r"arc_eazy: the harness has no such task; did you mean arc_easy\?"):
        Harness([Benchmark(task="arc_eazy")], root)


def test_a_metric_that_the_task_lacks_is_told_which_it_has() -> None:
    results = {"results": {"quiz": {"acc,none": 0.5, "acc_stderr,none": "N/A", "alias": "quiz"}}}
    assert benchmarks._figures(quiz(), results)["stderr"] is None
    with pytest.raises(StageError, match="no metric acc_norm; it has acc,none"):
        benchmarks._figures(quiz(metric="acc_norm"), results)


@pytest.mark.slow
def test_data_on_the_hub_are_downloaded_once(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_DATASETS_OFFLINE")
    published = tmp_path / "published"
    published.mkdir()
    (root / "data" / "quiz.jsonl").rename(published / "test.jsonl")
    of_files = "dataset_path: json\ndataset_kwargs: {data_files: {test: data/quiz.jsonl, train: data/quiz.jsonl}}\n"
    task = QUIZ.replace(of_files, "dataset_path: org/quiz\n").replace("training_split: train\n", "")
    (root / "data" / "quiz.yaml").write_text(task)
    hub = HubServer()
    hub.add("org/quiz", published)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    with hub.running():
        Harness([quiz()], root)
        assert hub.downloaded().count("test.jsonl") == 1
        Harness([quiz()], root)
    assert hub.downloaded().count("test.jsonl") == 1
    Harness([quiz()], root)  # the server is gone


@pytest.mark.slow
def test_data_that_the_hub_does_not_have(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_DATASETS_OFFLINE")
    (root / "data" / "quiz.yaml").write_text(QUIZ.replace("dataset_path: json", "dataset_path: org/absent"))
    hub = HubServer()
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    refusal = r"data/quiz.yaml: the task or its data cannot be loaded .*org/absent"
    with hub.running(), pytest.raises(StageError, match=refusal):
        Harness([quiz()], root)
