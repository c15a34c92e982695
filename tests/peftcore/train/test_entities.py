"""Entities and their F1: by hand, and against seqeval on random tags."""

import random

import pytest

from peftcore import TrainingError
from peftcore.train import Entity, EntityCounts, entities, entity_counts, is_bio_tag, summed_counts

TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


def test_entities_begin_with_b_and_go_on_with_i() -> None:
    assert entities(["B-PER", "I-PER", "O", "B-LOC", "B-LOC"]) == [
        Entity("PER", 0, 2),
        Entity("LOC", 3, 4),
        Entity("LOC", 4, 5),
    ]


def test_an_i_that_continues_nothing_begins_an_entity() -> None:
    assert entities(["I-PER", "I-LOC", "O", "I-LOC"]) == [
        Entity("PER", 0, 1),
        Entity("LOC", 1, 2),
        Entity("LOC", 3, 4),
    ]


def test_plain_tags_are_entities_of_one_word() -> None:
    assert entities(["NAME", "NAME", "O", "B-X"], "plain") == [
        Entity("NAME", 0, 1),
        Entity("NAME", 1, 2),
        Entity("B-X", 3, 4),
    ]


def test_a_type_may_hold_hyphens() -> None:
    assert entities(["B-a-b", "I-a-b"]) == [Entity("a-b", 0, 2)]
    assert is_bio_tag("I-a-b") and not is_bio_tag("I-") and not is_bio_tag("E-PER") and not is_bio_tag("PER")


def test_an_entity_counts_only_with_its_type_and_all_its_words() -> None:
    true = ["B-PER", "I-PER", "O", "B-LOC", "O", "B-LOC"]
    told = ["B-PER", "O", "O", "B-LOC", "B-LOC", "B-PER"]
    counts = entity_counts(true, told)
    assert counts == EntityCounts(correct=1, predicted=4, true=3)
    assert (counts.precision, counts.recall, counts.f1) == pytest.approx((1 / 4, 1 / 3, 2 / 7))


def test_without_any_entity_f1_is_0() -> None:
    counts = entity_counts(["O"], ["O"])
    assert (counts.precision, counts.recall, counts.f1) == (0, 0, 0)


def test_faulty_arguments_are_refused() -> None:
    with pytest.raises(TrainingError, match=r"tag 'PER' of word 1 is not O, B-TYPE or I-TYPE"):
        entities(["O", "PER"])
    with pytest.raises(TrainingError, match=r"scheme is 'plan'; did you mean 'plain'\?"):
        entities(["O"], "plan")  # pyright: ignore[reportArgumentType]
    with pytest.raises(TrainingError, match="2 predicted tags for 1 words"):
        entity_counts(["O"], ["O", "O"])


@pytest.mark.parametrize("scheme", ["bio", "plain"])
@pytest.mark.filterwarnings("ignore:.*(ill-defined|NE tag)")
def test_figures_are_those_of_seqeval(scheme: str) -> None:
    """Random tags have every order of marks and types, also those that BIO forbids."""
    metrics = pytest.importorskip("seqeval.metrics", reason="the peer to compare with; no part of the environment")
    draw = random.Random(0)
    tags = TAGS if scheme == "bio" else ["O", "S-NUM", "S-NAME", "S-OP"]  # seqeval's tag of an entity of one word
    for _ in range(50):
        lengths = [draw.randint(1, 12) for _ in range(6)]
        true, told = ([[draw.choice(tags) for _ in range(length)] for length in lengths] for _ in range(2))
        counts = summed_counts(entity_counts(*pair, scheme) for pair in zip(true, told, strict=True))  # pyright: ignore
        assert counts.f1 == pytest.approx(metrics.f1_score(true, told))
        assert counts.precision == pytest.approx(metrics.precision_score(true, told))
        assert counts.recall == pytest.approx(metrics.recall_score(true, told))
