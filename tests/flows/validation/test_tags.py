"""Tagged words: labels of words, tags that training lacks, entity types, and entities that begin with I-TYPE."""

from typing import Any

import pytest

from flows.params import Data
from flows.validation.tags import alignment, entity_types, known_tags, scheme


def test_healthy_tags_are_told_in_figures(patient: Any) -> None:
    well = patient("token_classification")
    assert well.look(alignment).figure == "0 of 60 rows whose labels are not their tags"
    assert well.look(known_tags).figure == "4 in train (O 70%, B-even 10%, B-odd 10%) of 200 words"
    assert well.look(entity_types).figure == "2 in train, the rarest 1.00 of the commonest (even)"
    assert well.look(scheme).figure == "0 of 60 rows have an I-TYPE that continues no entity of its type"


def test_a_label_that_is_not_its_words_tag_is_an_error(patient: Any) -> None:
    ill = patient("token_classification")
    ill.change("test", "labels", lambda rows: [[-100] * len(rows[0]), *rows[1:]])
    found = ill.look(alignment)
    assert found.severity == "error" and found.figure.startswith("1 of 60 rows") and len(found.examples) == 1


def test_a_tag_that_train_lacks_is_named(patient: Any) -> None:
    ill = patient("token_classification")
    ill.change("test", "tags", lambda rows: [rows[0].replace("B-even", "B-rare"), *rows[1:]])
    found = ill.look(known_tags)
    assert found.severity == "error" and "never in train: B-rare" in found.figure


def test_rows_without_entities_or_with_a_rare_type(patient: Any) -> None:
    ill = patient("token_classification")
    ill.change("train", "tags", lambda rows: ["B-odd B-odd O O O", "B-even O O O O", *["B-odd O O O O"] * 38])
    found = ill.look(entity_types)
    assert found.severity == "warning" and found.figure.endswith("0.03 of the commonest (even)")
    ill.change("train", "tags", lambda rows: ["O O O O O"] * 40)
    assert ill.look(entity_types).severity == "error"
    assert ill.look(known_tags).severity == "error"


@pytest.mark.parametrize(
    ("tags", "severity"),
    [
        ("O I-odd O O O", "warning"),
        ("B-even I-odd O O O", "warning"),
        ("I-odd I-odd O O O", "warning"),
        ("B-odd I-odd I-odd B-odd O", "ok"),
    ],
)
def test_an_i_that_continues_nothing_is_a_warning(patient: Any, tags: str, severity: str) -> None:
    ill = patient("token_classification")
    ill.change("train", "tags", lambda rows: [tags, *rows[1:]])
    assert ill.look(scheme).severity == severity


def test_many_of_them_are_another_scheme(patient: Any) -> None:
    ill = patient("token_classification")
    ill.change("train", "tags", lambda rows: ["I-odd O O O O"] * 40)
    assert "IOB1" in str(ill.look(scheme).fix)


def test_plain_tags_have_no_scheme_and_are_their_own_types(patient: Any) -> None:
    ill = patient("token_classification")
    ill.data = Data(source="rows.jsonl", kind="token_classification", tag_scheme="plain", max_length=200)
    assert ill.look(scheme).severity == "ok" and "plain" in ill.look(scheme).figure
    ill.change("train", "tags", lambda rows: ["NAME OP O O O"] * 40)
    assert ill.look(entity_types).figure.startswith("2 in train, the rarest 1.00")
