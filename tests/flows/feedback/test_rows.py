"""Rows of rated answers: one kind of row a file, nothing twice, nothing of the test set."""

from collections import Counter
from typing import Any

from flows.errors import DataError
from flows.feedback.ratings import Rated
from flows.feedback.rows import Rows, make_rows, without_known, without_test_rows


def rated(answer: str, good: bool | None, question: str = "Say it.", **fields: Any) -> Rated:
    values: dict[str, Any] = {"finish": "stop", "correction": None, "origin": {"request_id": answer}} | fields
    return Rated([{"role": "user", "content": question}], answer, good=good, **values)


def test_unpaired_preferences_are_each_answer_and_each_correction() -> None:
    answers = [rated("Good.", True), rated("Bad.", False), rated("Wrong.", False, correction="Right.")]
    answers.append(rated("Disputed.", None, correction="Clear."))
    rows = make_rows(answers, "unpaired_preference").rows
    assert [(row["completion"], row["label"]) for row in rows] == [
        ("Good.", True),
        ("Bad.", False),
        ("Wrong.", False),
        ("Right.", True),
        ("Clear.", True),
    ]
    assert rows[0]["prompt"] == [{"role": "user", "content": "Say it."}] and rows[0]["request_id"] == "Good."


def test_preferences_are_pairs_of_one_prompt_and_corrections() -> None:
    answers = [
        rated("Good.", True),
        rated("Bad.", False),
        rated("Worse.", False),
        rated("Alone.", True, "Another?"),
        rated("Wrong.", False, "Third?", correction="Right."),
    ]
    result = make_rows(answers, "preference")
    assert [(row["chosen"], row["rejected"]) for row in result.rows] == [("Right.", "Wrong."), ("Good.", "Bad.")]
    assert result.left_out == {"answers without a partner of the other rating for the same prompt": 2}


def test_chats_are_good_answers_and_corrections() -> None:
    answers = [rated("Good.", True), rated("Bad.", False), rated("Wrong.", True, correction="Right.")]
    result = make_rows(answers, "chat")
    assert [row["messages"][-1]["content"] for row in result.rows] == ["Good.", "Right."]
    assert result.left_out == {"bad answers, which a chat cannot teach": 1}


def test_duplicates_and_what_cannot_be_trained_on_are_counted() -> None:
    system = Rated([{"role": "system", "content": "Be brief."}], "Yes.", "stop", True, None, {"request_id": "s"})
    answers = [rated("Good.", True), rated("Good. ", True), rated("Cut of", True, finish="length"), system]
    answers += [rated(" ", True), rated("Too lon", False, finish="length")]
    result = make_rows(answers, "unpaired_preference")
    assert [row["completion"] for row in result.rows] == ["Good.", "Too lon"]
    assert result.left_out["duplicates"] == result.left_out["good answers that the token limit cut off"] == 1
    assert sum(count for reason, count in result.left_out.items() if reason.startswith("no row for training: ")) == 2


def test_requests_of_earlier_files_are_left_out() -> None:
    rows = make_rows([rated("One.", True), rated("Two.", True)], "chat")
    result = without_known(rows, {"One."})
    assert [row["request_id"] for row in result.rows] == ["Two."]
    assert result.left_out == {"of a request that an earlier file has": 1}


def test_a_row_that_cannot_be_tokenised_is_left_out_with_the_reason() -> None:
    def texts_of(row: dict[str, Any]) -> tuple[str, str]:
        if row["prompt"] == "bad":
            raise DataError("it holds <|im_end|>")
        return row["prompt"], row["completion"]

    rows = Rows([{"prompt": prompt, "completion": "Yes."} for prompt in ("bad", "good", "asked")])
    result = without_test_rows(rows, texts_of, [("asked", "No.")], 0.9)
    assert [row["prompt"] for row in result.rows] == ["good"]
    assert result.left_out == {
        "no row for training: it holds <|im_end|>": 1,
        "with the prompt of a test row": 1,
    }


def test_prompts_and_near_duplicates_of_test_rows_are_left_out() -> None:
    long = "The quick brown fox jumps over the lazy dog while {} watches from the old stone bridge near our town"
    rows = Rows([{"prompt": "In the test set", "completion": "New."}, {"prompt": "P", "completion": long.format("Ada")},
                 {"prompt": "Q", "completion": "Something that is quite different from all of that."}])  # fmt: skip
    test = [("In  the test set", "Old."), ("P, please", long.format("Bob"))]
    result = without_test_rows(rows, lambda row: (row["prompt"], row["completion"]), test, 0.4)
    assert [row["prompt"] for row in result.rows] == ["Q"]
    assert result.left_out == Counter({"with the prompt of a test row": 1, "near-duplicates of a test row": 1})
