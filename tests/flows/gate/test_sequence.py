"""Alpha spending over a sequence of looks: the levels, the versions that count, and the verdicts."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from gate_cases import champion_of, check, judge, reason
from numpy.random import default_rng
from params_texts import read

from flows.gate.candidate import Candidate
from flows.gate.promote import promote
from flows.gate.sequence import Look, at_look, left_after, level_of, look_of, part_for, percent
from flows.params import Gate, LookSequence
from flows.pipeline.status import status
from flows.registry.project_registry import registry_of

EVEN = LookSequence(alpha=0.05, looks=52)
PAGE = Path(__file__).parents[3] / "docs" / "promotion.md"
DECREASING = LookSequence(alpha=0.05, looks=52, spending="decreasing")


def test_the_example_in_the_documents_is_the_even_sequence(tmp_path: Path) -> None:
    section = PAGE.read_text().partition("### Sequential looks")[2]
    sequence = read(tmp_path, section.partition("```yaml")[2].partition("```")[0]).gate.sequence
    assert sequence == EVEN
    look = Look(3, 1, level_of(sequence, 3) * part_for(1), left_after(sequence, 3))
    assert look.in_words(sequence) in " ".join(section.split())


def test_even_levels_of_a_period_add_up_to_alpha() -> None:
    assert sum(level_of(EVEN, number) for number in range(1, 53)) == pytest.approx(0.05)
    assert [left_after(EVEN, number) for number in (1, 26, 52, 53)] == pytest.approx(
        [0.05 * 51 / 52, 0.025, 0, 0.05 * 51 / 52]
    )


def test_decreasing_levels_add_up_to_alpha_over_a_sequence_without_an_end() -> None:
    levels = [level_of(DECREASING, number) for number in range(1, 20_001)]
    assert all(later < earlier for earlier, later in pairwise(levels))
    assert sum(levels[:52]) == pytest.approx(0.025), "half of alpha after `looks` looks"
    assert 0.0498 < sum(levels) < 0.05
    for number in (1, 7, 52, 20_000):
        assert sum(levels[:number]) + left_after(DECREASING, number) == pytest.approx(0.05)


def test_all_comparisons_of_a_version_spend_at_most_its_level() -> None:
    parts = [part_for(champion) for champion in range(1, 30)]
    assert parts[:3] == pytest.approx([0.9, 0.09, 0.009])
    assert sum(parts) == pytest.approx(1) and all(part > 0 for part in parts)


@pytest.mark.parametrize(("sequence", "number"), [(LookSequence(), 1), (EVEN, 0)])
def test_a_level_needs_alpha_and_a_look(sequence: LookSequence, number: int) -> None:
    for function in (level_of, left_after):
        with pytest.raises(ValueError, match="alpha and a number of at least 1"):
            function(sequence, number)


def test_a_look_makes_the_comparison_stricter_and_never_laxer() -> None:
    gate = Gate(sequence=EVEN)
    assert at_look(gate, None) is gate
    strict = at_look(gate, Look(1, 1, 1e-4, 0.04)).champion
    assert strict.confidence == pytest.approx(0.9999) and strict.resamples == pytest.approx(100_000, abs=1)
    assert at_look(gate, Look(1, 1, 0.2, 0.0)).champion == gate.champion


def test_a_level_that_no_bootstrap_can_test_is_refused_at_once(make: Callable[..., Candidate]) -> None:
    gate = Gate(sequence=EVEN)
    looks = [Look(1, met, level_of(EVEN, 1) * part_for(met), 0.04) for met in (4, 5, 20)]
    assert [at_look(gate, look).champion.resamples for look in looks] == [11_555_556, 20_000_000, 20_000_000]
    champion = champion_of(make("v0.2.0", loss=2.7))
    for look in looks[1:]:
        old = replace(make("v0.1.0", loss=2.0), look=look)
        report = judge(old, champion, sequence=EVEN)
        assert "looks: look 1" in reason(report) and "the level is too small" in reason(report)
        assert "against the champion" not in [one.name for one in report.checks]
        assert judge(old, sequence=EVEN).passed, "nothing is compared if the stage is free"


def test_percents_show_how_far_they_are_from_all() -> None:
    assert [percent(one) for one in (0.8, 0.95, 0.975, 0.99, 0.999, 0.99904, 0.999968)] == [
        "80%", "95%", "97.5%", "99%", "99.9%", "99.904%", "99.9968%",
    ]  # fmt: skip


def test_the_level_of_the_look_decides(make: Callable[..., Candidate]) -> None:
    """A gain of 2.3 standard errors is beyond chance at 95 %, and not at 99.91 %."""
    noise = default_rng(0).normal(0, 1, 40)
    changes = 0.1 + 0.27 * (noise - noise.mean()) / noise.std()
    champion = champion_of(make("v0.1.0", row_changes=tuple(changes)))
    candidate = make()
    report = judge(candidate, champion)
    assert report.passed and "95% upper bound" in check(report, "against the champion")
    assert "looks" not in [one.name for one in report.checks]
    sequence = LookSequence(alpha=0.05)
    report = judge(replace(candidate, look=Look(3, 1, 0.0009, 0.047)), champion, sequence=sequence)
    assert reason(report).startswith("against the champion: ") and "99.91% upper bound" in reason(report)
    assert check(report, "looks") == "look 3, in periods of 52: level 0.0009; 0.047 of the budget of 0.05 is left"


def with_sequence(project: Any, **sequence: Any) -> Any:
    gate = project.params.gate.model_copy(update={"sequence": LookSequence(**sequence)})
    return project.params.model_copy(update={"gate": gate})


def looks(project: Any, params: Any) -> dict[str, tuple[int, int]]:
    """{version: (number of its look, number of its champion)}"""
    registry = registry_of(params, project.root).snapshot()
    found = {one.number: look_of(registry, one, params.gate) for one in registry.versions()}
    return {number: (look.number, look.champion) for number, look in found.items() if look}


def test_looks_follow_from_the_registry_and_judging_again_spends_nothing(registered: Any) -> None:
    assert looks(registered, registered.params) == {} and status(registered.params, registered.paths)["looks"] is None
    params = with_sequence(registered, alpha=0.05, spending="decreasing")
    promote(params, registered.paths)
    registered.register(loss=3.1, weight=2.0)
    refused = [promote(params, registered.paths, dry_run=dry) for dry in (False, True, False)]
    assert {one.outcome for one in refused} == {"refused"} and len({str(one.report) for one in refused}) == 1
    assert looks(registered, params) == {"v0.1.0": (1, 1), "v0.1.1": (2, 1)}
    assert refused[0].report is not None
    told = check(refused[0].report, "looks")
    assert told == "look 2: level 0.000818; 0.0481 of the budget of 0.05 is left"
    facts = json.loads(json.dumps(status(params, registered.paths)))["looks"]
    assert facts["in_words"] == told and facts["number"] == 2

    registered.register(loss=2.5, weight=3.0)
    assert promote(params, registered.paths).outcome == "promoted"
    expected = {"v0.1.0": (1, 2), "v0.1.1": (2, 2), "v0.1.2": (3, 2)}
    assert looks(registered, params) == expected, "compared with the new champion, they spend another part"

    registered.git("tag", "--annotate", "--message=bad", "docstrings@v0.1.1!", "docstrings@v0.1.1^{}")
    assert looks(registered, params)["v0.1.2"][0] == 3, "a withdrawn version has spent its level"


def test_other_test_rows_share_the_budget_unless_the_scope_is_the_test_rows(registered: Any) -> None:
    registered.register(weight=2.0, evaluation_set="b" * 64)
    registered.register(weight=3.0, evaluation_set="b" * 64)
    whole, rows = (with_sequence(registered, alpha=0.05, scope=scope) for scope in ("project", "test_rows"))
    assert [number for number, _ in looks(registered, whole).values()] == [1, 2, 3]
    assert [number for number, _ in looks(registered, rows).values()] == [1, 1, 2]


def test_versions_made_while_the_stage_was_free_have_met_no_champion(registered: Any) -> None:
    params = with_sequence(registered, alpha=0.05)
    registered.register(weight=2.0)
    assert [champion for _, champion in looks(registered, params).values()] == [1, 1]
    promote(params, registered.paths, "v0.1.0")
    assert looks(registered, params)["v0.1.1"] == (2, 1)
