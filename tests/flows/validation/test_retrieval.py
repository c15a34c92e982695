"""Checks of queries and passages on rows that are well and on rows that are not."""

from typing import Any

from flows.validation import retrieval


def test_rows_that_are_well(patient: Any) -> None:
    well = patient("retrieval")
    for check in (retrieval.passages, retrieval.repeated_queries, retrieval.shared_passages):
        assert well.look(check).severity == "ok", check
    finding = well.look(retrieval.negatives)
    assert finding.severity == "ok" and finding.figure == "1.0 per training row, none in 0 of 40"


def test_negatives_for_some_rows_alone_are_a_warning(patient: Any) -> None:
    ill = patient("retrieval")
    ill.change("train", "negatives", lambda rows: [row if n % 4 else [] for n, row in enumerate(rows)])
    finding = ill.look(retrieval.negatives)
    assert finding.severity == "warning" and finding.figure == "0.8 per training row, none in 10 of 40"
    ill.change("train", "negatives", lambda rows: [[] for _ in rows])
    assert ill.look(retrieval.negatives).severity == "ok"


def test_a_right_passage_among_the_negatives_is_an_error(patient: Any) -> None:
    ill = patient("retrieval")
    ill.change("train", "negatives", lambda rows: [["It is  1001."] if n == 1 else row for n, row in enumerate(rows)])
    finding = ill.look(retrieval.passages)
    assert finding.severity == "error" and "1 a right passage among the negatives" in finding.figure


def test_a_passage_that_is_its_query_is_a_warning(patient: Any) -> None:
    ill = patient("retrieval")
    ill.change("test", "positive", lambda rows: ["Is 48 or 3304 more?", *rows[1:]])
    finding = ill.look(retrieval.passages)
    assert finding.severity == "warning" and finding.figure.startswith("1 of 60 rows have their query as the passage")


def test_queries_of_several_rows_are_counted(patient: Any) -> None:
    ill = patient("retrieval")
    ill.change("train", "query", lambda rows: ["Again?"] * 10 + rows[10:])
    finding = ill.look(retrieval.repeated_queries)
    assert finding.severity == "warning" and finding.examples == ("Again?",)
    assert finding.figure == "10 of 40 training rows have a query of several rows"


def test_passages_of_test_rows_that_were_trained_on_are_counted(patient: Any) -> None:
    ill = patient("retrieval")
    ill.change("test", "positive", lambda rows: ["It is 1000.", "It is 1001.", *rows[2:]])
    finding = ill.look(retrieval.shared_passages)
    assert finding.severity == "warning" and finding.figure.startswith("2 of 12 test passages (16.7%)")
