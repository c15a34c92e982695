"""Text comes in pieces that together are the whole, and nothing of a stop text is ever in them."""

import random
from typing import Any

import pytest

from peftcore.serving.text import TextStream


def pieces(tokenizer: Any, tokens: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    stream = TextStream(tokenizer, stop)
    found = []
    for token in tokens:
        found.append(stream.push(token))
        if stream.stopped:
            return found, True
    return [*found, stream.finish()], stream.stopped


@pytest.mark.parametrize("text", ["plain", "Grüße, 世界! 👩‍🚀 fin", " leading and trailing ", "👍"])
def test_characters_of_several_tokens_come_whole(tokenizer: Any, text: str) -> None:
    found, _ = pieces(tokenizer, tokenizer(text)["input_ids"])
    assert "".join(found) == text
    assert not any("�" in piece for piece in found)


@pytest.mark.parametrize("seed", range(5))
def test_any_tokens_give_what_decoding_them_at_once_gives(tokenizer: Any, seed: int) -> None:
    tokens = random.Random(seed).choices(range(len(tokenizer)), k=120)
    whole = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert "".join(pieces(tokenizer, tokens)[0]) == whole


def test_a_stop_text_ends_it_wherever_tokens_end(tokenizer: Any) -> None:
    tokens = tokenizer("SELECT 1;\n\nSELECT 2;")["input_ids"]
    found, stopped = pieces(tokenizer, tokens, ("\n\n", "never"))
    assert (("".join(found)), stopped) == ("SELECT 1;", True)
    assert pieces(tokenizer, tokens, ("2;",))[1]
    assert pieces(tokenizer, tokens, ("2;", "1"))[0] == [*"SELECT ", ""]


def test_what_only_begins_a_stop_text_is_given_after_all(tokenizer: Any) -> None:
    found, stopped = pieces(tokenizer, tokenizer("aabaab.")["input_ids"], ("aabaac",))
    assert ("".join(found), stopped) == ("aabaab.", False)
    found, stopped = pieces(tokenizer, tokenizer("xaab")["input_ids"], ("aabaac",))
    assert (found, stopped) == (["x", "", "", "", "aab"], False)


def test_a_text_that_goes_on_keeps_the_space_before_its_first_word(sentencepiece: Any) -> None:
    ids = sentencepiece.convert_tokens_to_ids
    tokens = ids(["▁cat", "s", "<0xC3>", "<0xA9>"])
    for before, expected in ((["▁the"], " catsé"), ([], "catsé"), (["<0xC3>"], "catsé")):
        stream = TextStream(sentencepiece, before=ids(before))
        assert "".join(stream.push(token) for token in tokens) + stream.finish() == expected
    rest = TextStream(sentencepiece, before=ids(["<0xC3>"]))  # the prompt ends within a character
    assert rest.push(ids("<0xA9>")) + rest.push(ids("s")) + rest.finish() == "�s"


def test_a_special_token_that_marks_a_tool_call_is_part_of_the_text(tokenizer: Any) -> None:
    ids = tokenizer("aé")["input_ids"]
    marked = TextStream(tokenizer, (), {1: "[TOOL_CALLS]"})
    assert "".join(marked.push(token) for token in [0, *ids, 1, *ids]) + marked.finish() == "aé[TOOL_CALLS]aé"
    plain = TextStream(tokenizer)
    assert "".join(plain.push(token) for token in [0, *ids, 1, *ids]) + plain.finish() == "aéaé"
