"""The page: one file that needs nothing else, shows what was found, and lets nothing in it become markup."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
from made_up_results import suite_result

from flows.charts.ranks import HEAT_MAP, rank_heat_map
from flows.errors import StageError
from flows.gate.gate import Check
from flows.gate.judging import judge_figures
from flows.gate.promote import promote
from flows.review.page import write_review
from peftcore.files import sha256

VOID = {"meta", "br", "hr", "img", "link"}


class Page(HTMLParser):
    """Collects tags and text, and sees that every tag is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(project: Any) -> Page:
    return Page(write_review(project.params, project.paths).read_text())


def test_it_needs_nothing_from_elsewhere(registered: Any) -> None:
    page = page_of(registered)
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert all(link.startswith("#") for link in page.links)
    html = registered.paths.review.read_text()
    assert not re.search(r"@import|url\((?!#)", html)


def test_the_loss_of_an_objective_without_tokens_is_per_row(project: Any) -> None:
    sides = {side: {"loss": loss, "accuracy": 0.9} for side, loss in (("base", 1.1), ("adapter", 0.4))}
    project.register(**sides)
    text = page_of(project).text
    assert "nats per row" in text and "nats per supervised token" not in text.partition("Digests are SHA-256")[0]


def test_the_figures_of_a_token_classifier_are_of_words(project: Any) -> None:
    bins = [{"share": 1.0, "accuracy": 0.8, "confidence": 0.9}]
    calibration = {side: {"ece": 0.1, "brier": 0.3, "predictions": 1234, "bins": bins} for side in ("base", "adapter")}
    sides = {side: {"loss": loss, "entity_f1": 0.5} for side, loss in (("base", 1.1), ("adapter", 0.4))}
    project.register(**sides, calibration=calibration, baseline="a prediction of the tag frequencies")
    words = " ".join(page_of(project).text.split())
    for fact in ("nats per word", "The baseline is a prediction of the tag frequencies.", "for 1,234 words"):
        assert fact in words, fact
    assert "nats per row" not in words


def test_a_baseline_is_named_and_labels_its_figures(project: Any) -> None:
    project.register(baseline="passages in random order", loss_function="Dpo(beta=0.1, loss='sigmoid')")
    page = page_of(project)
    words = " ".join(page.text.split())
    for fact in (
        "Baseline and adapter",
        "The base has no trained head for this task. The baseline is passages in random order.",
        "The loss (DPO, beta 0.1, sigmoid loss) falls",
    ):
        assert fact in words, fact
    assert "Dpo(" not in words


def test_a_loss_that_grew_rises(project: Any) -> None:
    """A loss that "falls by -0.219" would be read as a gain."""
    project.register(base={"loss": 0.787, "macro_f1": 0.3}, adapter={"loss": 1.006, "macro_f1": 0.3})
    assert "rises by 0.219 nats per row" in " ".join(page_of(project).text.split())


def test_it_shows_the_run(registered: Any) -> None:
    record = json.loads(registered.paths.version.read_text())
    promote(registered.params, registered.paths)
    page = page_of(registered)
    words = " ".join(page.text.split())
    for fact in (
        "docstrings v0.1.0 is champion",
        "The loss falls by 1.100 nats per token",
        "Measured on 40 held-out rows",
        "merge fidelity",
        "Limits that this first version supports",
        "gate: min_loss_gain: 0.54",
        "best: 2.700 at step 4",
        "LlamaForCausalLM (llama, causal decoder)",
        "60 examples from stdlib:docstrings",
        "3 longer than 320 tokens",
        "2 of 120 rows hold control characters; write the source as UTF-8",
        "1 min 1 s",
        record["adapter"]["files"]["adapter_model.safetensors"],
        record["git"]["commit"],
    ):
        assert fact in words, fact
    assert page.tags.count("svg") == 3
    assert (
        "Scorers" not in words
        and "Prompt suites" not in words
        and "Benchmarks" not in words
        and "Calibration" not in words
    )
    assert "<mark>Say hello.</mark>" in registered.paths.review.read_text()


def test_what_models_and_data_say_stays_text(registered: Any) -> None:
    page = page_of(registered)
    assert "<script>alert(1)</script>" in page.text
    assert "Say <hello> & wave." in page.text
    assert "<ssl> (10)" in page.text, "a slice's name in a chart"


def test_a_refusal_is_the_headline(project: Any) -> None:
    project.register(loss=3.7)
    promote(project.params, project.paths)
    text = " ".join(page_of(project).text.split())
    assert "docstrings v0.1.0 is not promoted to champion: gain in loss: 0.100 nats, at least 0.5" in text
    assert "Limits that this first version supports" not in text


def test_before_promotion_it_says_so(registered: Any) -> None:
    assert "not judged by the gate yet" in page_of(registered).text


def test_a_stage_that_has_not_run_is_named_and_the_old_page_stays(registered: Any) -> None:
    page = write_review(registered.params, registered.paths)
    before = page.read_bytes()
    registered.paths.samples.unlink()
    with pytest.raises(StageError, match=r"samples\.json is missing"):
        write_review(registered.params, registered.paths)
    assert page.read_bytes() == before
    assert not list(page.parent.glob(".review*"))


def test_the_same_run_gives_the_same_page(registered: Any) -> None:
    first = write_review(registered.params, registered.paths).read_bytes()
    assert write_review(registered.params, registered.paths).read_bytes() == first


def test_ranks_that_differ_between_layers_are_shown(registered: Any) -> None:
    assert "on average" not in page_of(registered).text
    chart = rank_heat_map({"layers.0.q_proj": 3, "layers.1.q_proj": 9}, "Ranks")
    (registered.paths.training / HEAT_MAP).write_text(str(chart))
    page = page_of(registered)
    assert "2 layers, 12 ranks in all, 6.0 on average" in page.text
    assert all(link.startswith("#") for link in page.links)


def test_scorers_have_a_table_and_columns_of_the_slices(project: Any) -> None:
    project.register(scores={"token_f1": (0.25, 0.5)})
    metrics = json.loads(project.paths.evaluation_metrics.read_text())
    failed = {"on_error": 0.0, "failures": {"base": 0, "adapter": 3}, "first_failure": "row a: <b>Error"}
    metrics["scorers"]["token_f1"] |= failed
    project.paths.evaluation_metrics.unlink()  # a link into DVC's cache
    project.paths.evaluation_metrics.write_text(json.dumps(metrics))
    assert "base 0, adapter 3: such rows got 0.0; first: row a: <b>Error" in " ".join(page_of(project).text.split())
    cells = re.sub(r"\s*<[^>]*>\s*", "|", project.paths.review.read_text())
    assert "token_f1|||0.250||0.500||+0.250||10|" in cells
    assert re.search(r"json\|\|30\|\|3.800\|\|[\d.]+\|\|[+\d.]+\|\|0.250\|\|0.500\|", cells)
    assert re.search(r"&lt;ssl&gt;\|\|10\|\|3.800\|\|[\d.]+\|\|[+\d.]+\|\|–\|\|–\|", cells), "it has no answers"


def test_a_slice_of_weight_0_has_a_dash_and_the_reason(project: Any) -> None:
    project.register()
    metrics = json.loads(project.paths.evaluation_metrics.read_text())
    metrics["slices"]["<ssl>"] |= {"base_loss": None, "adapter_loss": None}
    project.paths.evaluation_metrics.unlink()  # a link into DVC's cache
    project.paths.evaluation_metrics.write_text(json.dumps(metrics))
    words = " ".join(page_of(project).text.split())
    assert "Test loss of the 1 largest of 2 slices" in words
    assert "All rows of <ssl> have weight 0, so there is no loss." in words
    cells = re.sub(r"\s*<[^>]*>\s*", "|", project.paths.review.read_text())
    assert "&lt;ssl&gt;||10||–||–||–|" in cells


def test_suites_show_failing_prompts_with_their_answers(project: Any) -> None:
    project.register(suites={"support": suite_result({"b": "it lacks 'x'"}), "safety": suite_result()})
    page = page_of(project)
    words = " ".join(page.text.split())
    cells = re.sub(r"\s*<[^>]*>\s*", "|", project.paths.review.read_text())
    assert "support||1 greedy||3||1||66.7%|" in cells and "safety||1 greedy||3||0||100.0%|" in cells
    shown = "support: failing prompts b: must contain 'x'; must refuse Tell <b>. adapter <i>answer</i> b ✗ must contain"
    assert shown in words.replace("adapter<", "adapter <")
    assert "support: 2 passing prompts" in words and "safety: 3 passing prompts" in words
    assert "safety: failing prompts" not in words


def test_sampled_suites_show_pass_at_k_and_seeds(project: Any) -> None:
    result = suite_result({"a": "it lacks 'x'"}) | {"seeds": [7, 8], "pass_at": 1, "at_least": 0.5}
    for prompt in result["prompts"]:
        (answer,) = prompt["answers"]
        prompt["answers"] = [answer | {"seed": 7}, answer | {"seed": 8, "failed": {}}]
    project.register(suites={"support": result})
    words = " ".join(page_of(project).text.split())
    assert "2 sampled; pass@1 of at least 50% 3083.3%" in words, "three prompts, none fails"
    assert "(pass@1: 50.0%)" in words and "adapter, seed 8" in words


def test_benchmarks_have_a_table_with_standard_errors(project: Any) -> None:
    side = {"metric": "acc,none", "value": 0.5, "stderr": 0.05, "higher": True, "rows": 100}
    identity = {"task": "quiz", "num_fewshot": 5, "limit": 100, "metric": None, "files": {}}
    quiz = {"identity": identity, "base": side, "adapter": side | {"value": 0.625, "stderr": None}}
    project.register(benchmarks={"quiz": quiz})
    page_of(project)
    cells = re.sub(r"\s*<[^>]*>\s*", "|", project.paths.review.read_text())
    assert "quiz||acc,none||100||5||0.5000 ± 0.0500||0.6250||+0.125|" in cells


def test_calibration_has_a_reliability_plot(project: Any) -> None:
    bins = [{"share": 0.4, "accuracy": 0.3, "confidence": 0.35}, {"share": 0.6, "accuracy": 0.8, "confidence": 0.9}]
    side = {"ece": 0.08, "brier": 0.31, "predictions": 1234, "bins": bins}
    project.register(calibration={"base": side | {"ece": 0.2}, "adapter": side})
    page = page_of(project)
    words = " ".join(page.text.split())
    assert "for 1,234 tokens" in words and "base (ECE 0.200)" in words and "adapter (ECE 0.080)" in words
    cells = re.sub(r"\s*<[^>]*>\s*", "|", project.paths.review.read_text())
    assert "Expected calibration error (0 to 1)||0.2000||0.0800|" in cells
    assert page.tags.count("svg") == 4 and all(link.startswith("#") for link in page.links)


def test_a_reward_model_and_best_of_n_are_shown(project: Any) -> None:
    curve = [{"n": n, "reward": n / 8, "rouge_l": 0.25, "kl_bound": 0.5} for n in (1, 2)]
    best = {"answers": 2, "scorer": "reward", "rows": 9, "prompts": 9, "failures": 0, "curve": curve}
    sides = {
        "base": {"loss": 0.6931, "accuracy": 0.5, "margin": 0.0},
        "adapter": {"loss": 0.4, "accuracy": 0.8125, "margin": 1.5},
    }
    project.register(**sides, objective="reward", best_of_n=best, latency=None, control=None)
    page = page_of(project)
    words = " ".join(page.text.split())
    assert "sampled 2 answers to each of 9 prompts, and the scorer reward chose the best of n." in words
    assert "81.2" in words, "the accuracy"
    cells = re.sub(r"\s*<[^>]*>\s*", "|", project.paths.review.read_text())
    assert "||2||0.2500||0.2500||0.50||" in cells


def test_the_judges_verdicts_have_a_section(project: Any) -> None:
    project.register()
    promotion = promote(project.params, project.paths)
    assert promotion.report is not None
    replies = [{"choice": "first", "text": ""}, {"choice": "second", "text": ""}]
    row = {
        "id": "r1",
        "prompt": "<b>Why?",
        "reference": "r",
        "candidate": "Because.",
        "champion": "So.",
        "outcome": "won",
    }
    figures = judge_figures([row | {"replies": replies}], 0.95)
    text = json.dumps({"rows": [row | {"replies": replies}]})
    project.paths.judgement.write_text(text)
    identity = {"endpoint": "http://h/v1", "model": "judge-7b", "served": ["judge-7b-q4"]}
    figures |= {"identity": identity, "verdicts": sha256(project.paths.judgement)}
    checks = (*promotion.report.checks, Check("judge", True, "in words", figures))
    judged = replace(promotion, report=replace(promotion.report, checks=checks, champion="v0.0.9"))
    project.paths.promotion.write_text(json.dumps(judged.as_dict()))
    words = " ".join(page_of(project).text.split())
    assert "judge-7b at http://h/v1 (served: judge-7b-q4) compared the answers with those of v0.0.9" in words
    assert "the first answer got 50.0% of the choices" in words
    assert "r1: won (first order: first, second order: second) <b>Why?" in words
    project.paths.judgement.write_text("{}")
    assert "<b>Why?" not in page_of(project).text, "verdicts of another comparison"
