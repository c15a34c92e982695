"""Formats of a row: chats in the formats of OpenAI, ShareGPT and Alpaca, preferences, labelled texts, tags, queries.

Each function takes a row's columns and raises FaultyRow with the problem and what fits. A null column or field counts
as absent, because Parquet gives every row all columns, and so does an empty cell of an optional column, because CSV
does. `flows.data.turns` reads the turns of a chat.
"""

import json
import math
import re
from collections.abc import Collection, Iterable
from typing import Any

from flows.data.examples import Message
from flows.data.turns import (
    FUNCTION,
    PAIR,
    REASONING,
    TOOL,
    FaultyRow,
    check_characters,
    check_data,
    check_order,
    listed,
    read_turns,
)

__all__ = [
    "FaultyRow",
    "chat",
    "document",
    "labelled",
    "margin",
    "preference",
    "retrieval",
    "source_and_target",
    "spelled_otherwise",
    "tagged",
    "tools",
    "unused_answer",
    "weight",
]
ONE_TURN = {"prompt": "completion", "question": "answer", "instruction": "output"}
"""{column of the question: column of the answer}; an `instruction` may have an `input`, as in Alpaca."""
_OTHER_KINDS = {
    "preference": ("chosen", "rejected"),
    "classification": ("text", "label"),
    "token_classification": ("tokens", "tags"),
    "seq2seq": ("source", "target"),
    "retrieval": ("query", "positive"),
}
"""{data.kind: columns that only rows of this kind have}"""
QUERIES = ("query", "anchor")
"""Columns of a query, of which a row has one."""
_NEGATIVE = re.compile(r"negative(_\d+)?")


def chat(row: dict[str, Any], ignored: Collection[str] = ()) -> list[Message]:
    """Return the row's chat: an optional system turn first, a user turn before the first answer, an answer last.

    ignored: fields of a turn that are left out. Every other field stays in its turn.
    """
    for column in ("messages", "conversations"):
        if row.get(column) is not None:
            turns = list(read_turns(listed(row[column], f"its {column} are"), ignored))
            turns = [*_system(row, turns), *turns]
            check_order(turns)
            return turns
    for question, answer in ONE_TURN.items():
        if row.get(question) is not None and answer in row:
            if isinstance(row[question], list):
                raise FaultyRow(f"its {question} is a list, not text; write all turns with the answer as messages")
            return _one_turn(row, question, answer, ignored)
        if row.get(question) is not None:
            raise FaultyRow(f"it has no {answer}{spelled_otherwise(row, [answer])}")
    for kind, columns in _OTHER_KINDS.items():
        if all(column in row for column in columns):
            raise FaultyRow(f"it has {' and '.join(columns)}; set data.kind to {kind}")
    if "text" in row:
        raise FaultyRow("it has a text; set data.kind to text")
    known = ["messages", "conversations", *ONE_TURN, *ONE_TURN.values()]
    if null := [column for column in known if column in row and row[column] is None]:
        verb = "is" if len(null) == 1 else "are"
        raise FaultyRow(f"its {', '.join(null)} {verb} null; give the row a question and an answer, or remove it")
    raise FaultyRow(
        f"it has neither messages nor prompt and completion, but {', '.join(row) or 'nothing'}"
        + spelled_otherwise(row, known)
    )


def unused_answer(row: dict[str, Any]) -> str | None:
    """Return the columns of a question and an answer that `chat` leaves out, because the row also has turns."""
    if all(row.get(column) is None for column in ("messages", "conversations")):
        return None
    pairs = (pair for pair in ONE_TURN.items() if all(not _is_absent(row.get(column)) for column in pair))
    return next((f"{question} and {answer}" for question, answer in pairs), None)


def preference(
    row: dict[str, Any], ignored: Collection[str] = ()
) -> tuple[list[Message], list[Message], list[Message]]:
    """Return the chat up to the answer, the chosen continuation, and the rejected one.

    In the row, `chosen` and `rejected` are texts, a turn, lists of turns, or whole chats. Whole chats share their first
    turns, which are then returned as the chat up to the answer. OpenAI's `input`, `preferred_output` and
    `non_preferred_output` are the same.

    ignored: fields of a turn that are left out.
    """
    row = _openai_preference(row)
    for column in ("chosen", "rejected"):
        if row.get(column) is None:
            raise FaultyRow(
                f"it has no {column}; a row of data.kind preference has prompt, chosen and rejected"
                + spelled_otherwise(row, ["prompt", "chosen", "rejected"])
            )
    prompt = _prompt(row, ignored)
    chosen, rejected = (_turns_of(row, column, "assistant", ignored) for column in ("chosen", "rejected"))
    if chosen[0]["role"] == "assistant" and rejected[0]["role"] == "assistant":
        if not prompt:
            raise FaultyRow("it has no prompt; give one, or begin chosen and rejected with the user's turns")
    else:
        common = _common(chosen, rejected)
        begins = [turn for turn in common if turn["role"] != "system"][: len(prompt)]
        if prompt not in (begins, common[: len(prompt)]):
            raise FaultyRow(
                "its chosen and rejected are chats that do not both begin with its prompt; remove the prompt"
            )
        prompt, chosen, rejected = common, chosen[len(common) :], rejected[len(common) :]
    prompt = [*_system(row, prompt), *prompt]
    for answer in (chosen, rejected):
        check_order([*prompt, *answer])
        if answer[0]["role"] != "assistant":
            raise FaultyRow("its chosen and rejected differ before an assistant turn; only answers may differ")
    return prompt, chosen, rejected


def unpaired_preference(
    row: dict[str, Any], ignored: Collection[str] = ()
) -> tuple[list[Message], list[Message], bool]:
    """Return the chat up to the answer, the answer, and True if its label says that the answer is a good one.

    The answer is `completion`, text or turns after `prompt`; in whole chats it is the last turn.

    ignored: fields of a turn that are left out.
    """
    if row.get("label") is None:
        if all(row.get(column) is not None for column in _OTHER_KINDS["preference"]):
            raise FaultyRow("it has chosen and rejected; set data.kind to preference")
        raise FaultyRow(
            "it has no label; a row of data.kind unpaired_preference has prompt, completion and label (true for a good "
            "answer, false for a bad one)" + spelled_otherwise(row, ["label"])
        )
    desirable = _flag(row["label"])
    if row.get("prompt") is None or row.get("completion") is None:
        turns = chat(row, ignored)
        return turns[:-1], turns[-1:], desirable
    prompt, completion = _prompt(row, ignored), _turns_of(row, "completion", "assistant", ignored)
    if reasoning := _reasoning(row):
        completion = [*completion[:-1], *read_turns([completion[-1] | reasoning], ignored)]
    prompt = [*_system(row, prompt), *prompt]
    check_order([*prompt, *completion])
    if completion[0]["role"] != "assistant":
        raise FaultyRow(
            f"its completion begins with a turn of the role {completion[0]['role']}, not assistant; move turns before "
            "the answer into prompt"
        )
    return prompt, completion, desirable


def _flag(label: Any) -> bool:
    """Return a label as True or False; CSV holds it as text."""
    flag = {"true": True, "1": True, "false": False, "0": False}.get(str(label).strip().lower())
    if flag is None:
        raise FaultyRow(f"its label is {label!r:.80}; give true for a good answer, or false for a bad one")
    return flag


def labelled(row: dict[str, Any]) -> tuple[str, str]:
    """Return the text and the name of its class; integers are names too."""
    for column in ("text", "label"):
        if row.get(column) is None:
            raise FaultyRow(
                f"it has no {column}; a row of data.kind classification has text and label"
                + spelled_otherwise(row, ["text", "label"])
            )
    label = row["label"]
    check_data(label, "its label")
    if not isinstance(label, str | int) or not str(label).strip():
        raise FaultyRow(f"its label is {label!r:.80}; give a name or a whole number")
    return _text(row, "text"), str(label).strip()


_BIO = re.compile(r"O|[BI]-\S+")
"""A tag of the scheme bio."""


def tagged(row: dict[str, Any], scheme: str = "bio") -> tuple[list[str], list[str]]:
    """Return the words and their tags. CSV holds both as JSON lists. scheme: the value of `data.tag_scheme`."""
    for column in ("tokens", "tags"):
        if row.get(column) is None:
            raise FaultyRow(
                f"it has no {column}; a row of data.kind token_classification has tokens and tags"
                + spelled_otherwise(row, ["tokens", "tags"])
            )
    words, tags = _strings(row, "tokens"), _strings(row, "tags")
    if len(words) != len(tags):
        raise FaultyRow(f"it has {len(words)} tokens and {len(tags)} tags; give one tag for each token")
    if not words:
        raise FaultyRow("its tokens are empty; give it words and tags, or remove the row")
    for number, (word, tag) in enumerate(zip(words, tags, strict=True), start=1):
        if not word.strip():
            raise FaultyRow(f"its token {number} is empty or white space; remove it with its tag")
        if not tag or tag.split() != [tag]:
            raise FaultyRow(f"its tag {number} is {tag!r:.80}; a tag is a word without spaces")
        if scheme == "bio" and not _BIO.fullmatch(tag):
            raise FaultyRow(
                f"its tag {number} is {tag!r:.80}, not O, B-TYPE or I-TYPE; correct it, or set data.tag_scheme: plain "
                "if a tag stands for one token"
            )
    check_characters(" ".join(words), "its tokens")
    return words, tags


def _strings(row: dict[str, Any], column: str) -> list[str]:
    """Return a column with a list of texts or whole numbers, as texts."""
    value = row[column]
    if isinstance(value, str):  # CSV has no lists
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise FaultyRow(f'its {column} are no JSON list ({error}); write them as ["one", "two"]') from error
    if not isinstance(value, list) or not all(isinstance(one, str | int) for one in value):
        raise FaultyRow(f'its {column} are {value!r:.80}; give a list of texts, such as ["one", "two"]')
    return [str(one) for one in value]


def source_and_target(row: dict[str, Any]) -> tuple[str, str]:
    """Return the source, which may be called `input`, and the target."""
    source = next((column for column in ("source", "input") if row.get(column) is not None), None)
    missing = "source" if source is None else "target" if row.get("target") is None else None
    if source is None or missing is not None:
        raise FaultyRow(
            f"it has no {missing}; a row of data.kind seq2seq has source (or input) and target"
            + spelled_otherwise(row, ["source", "input", "target"])
        )
    return _text(row, source), _text(row, "target")


def retrieval(row: dict[str, Any]) -> tuple[str, str, tuple[str, ...]]:
    """Return the query, its passage and the hard negatives of a row.

    Columns: query and positive, with negatives (a list of texts, in CSV as JSON); or those of Sentence Transformers:
    anchor, positive, and negative or negative_1, negative_2 and so on.
    """
    query = next((name for name in QUERIES if row.get(name) is not None), None)
    if query is None or row.get("positive") is None:
        missing = "query" if query is None else "positive"
        raise FaultyRow(
            f"it has no {missing}; a row of data.kind retrieval has query (or anchor), positive, and optional negatives"
            + spelled_otherwise(row, [*QUERIES, "positive", "negatives"])
        )
    others = [name for name in QUERIES if name != query and row.get(name) is not None]
    if others and row[others[0]] != row[query]:
        raise FaultyRow(f"its {query} and {others[0]} differ; give one of them")
    negatives: list[Any] = []
    if not _is_absent(row.get("negatives")):
        negatives += _texts(row["negatives"])
    negatives += [value for name, value in row.items() if _NEGATIVE.fullmatch(str(name)) and not _is_absent(value)]
    numbered = {f"negatives[{number}]": value for number, value in enumerate(negatives)}
    texts = tuple(_text(numbered, name) for name in numbered)
    positive = _text(row, "positive")
    if positive in texts:
        raise FaultyRow("its positive is one of its negatives; remove it there")
    return _text(row, query), positive, texts


def _texts(value: Any) -> list[Any]:
    """Return the negatives of a row, which CSV holds as JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    if not isinstance(value, list):
        raise FaultyRow('its negatives are no list of texts, such as ["one", "two"]')
    return value


def document(row: dict[str, Any]) -> str:
    """Return the row's text."""
    if "text" not in row:
        raise FaultyRow(f"it has no text, but {', '.join(row) or 'nothing'}{spelled_otherwise(row, ['text'])}")
    return _text(row, "text")


def spelled_otherwise(row: dict[str, Any], known: Iterable[str]) -> str:
    """Return a hint at columns that differ from known ones only in capitals or spaces; "" if there are none."""
    columns = {column.strip().lower(): column for column in row if isinstance(column, str) and column not in known}
    matches = [column for column in known if column in columns]
    if not matches:
        return ""
    named = ", ".join(f"{columns[column]!r}" for column in matches)
    return f"; write {named} as {', '.join(matches)}: capitals and spaces count"


def weight(row: dict[str, Any]) -> float:
    """Return the factor of the row's loss; 1 without a `weight`."""
    number = 1.0 if _is_absent(row.get("weight")) else row["weight"]
    try:
        value = math.nan if isinstance(number, bool) else float(number)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not 0 <= value < math.inf:
        raise FaultyRow(f"its weight is {number!r:.80}; give a number of at least 0")
    return value


def _is_absent(value: Any) -> bool:
    """Return True for the value of an optional column that a row does not have: null, or an empty cell of CSV."""
    return value is None or value == ""


def margin(row: dict[str, Any], column: str) -> float:
    """Return by how much the chosen answer of a pair is better than the rejected one."""
    if row.get(column) is None:
        hint = spelled_otherwise(row, [column])
        raise FaultyRow(f"it has no {column} (data.margin_column); its columns are {', '.join(row)}{hint}")
    try:
        value = math.nan if isinstance(row[column], bool) else float(row[column])
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not 0 <= value < math.inf:
        raise FaultyRow(
            f"its {column} is {row[column]!r:.80}; give a number of at least 0: by how much chosen is better"
        )
    return value


def tools(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Return the functions that the chat may call: `tools`, or `functions` as OpenAI wrote them before."""
    row = _openai_preference(row)
    if not _is_absent(row.get("functions")):
        if not _is_absent(row.get("tools")):
            raise FaultyRow("it has tools and functions; write all of them as tools")
        functions = [
            {"type": "function", "function": one} for one in listed(row["functions"], "its functions are", FUNCTION)
        ]
    elif not _is_absent(row.get("tools")):
        functions = listed(row["tools"], "its tools are", TOOL)
    else:
        return None
    check_data(functions, "its tools")
    return functions


def _openai_preference(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of OpenAI's preference format with the columns prompt, chosen, rejected and tools."""
    task = row.get("input")
    if row.get("preferred_output") is None or not isinstance(task, dict):
        return row
    others = {key: value for key, value in row.items() if key not in ("input", "preferred_output")}
    return others | {
        "prompt": task.get("messages"),
        "chosen": row["preferred_output"],
        "rejected": row.get("non_preferred_output"),
        "tools": task.get("tools"),
    }


def _prompt(row: dict[str, Any], ignored: Collection[str]) -> list[Message]:
    """Return the turns before both answers of a preference; [] if chosen and rejected hold them."""
    for column in ("prompt", "conversations", "messages"):
        if row.get(column) is not None:
            return _turns_of(row, column, "user", ignored)
    for column in ("question", "instruction"):
        if row.get(column) is not None:
            return [*_history(row), {"role": "user", "content": _question(row, column)}]
    return []


def _one_turn(row: dict[str, Any], question: str, answer: str, ignored: Collection[str]) -> list[Message]:
    history, user = _history(row), {"role": "user", "content": _question(row, question)}
    last = {"role": "assistant", "content": _text(row, answer)} | _reasoning(row)
    turns = [*history, user, *read_turns([last], ignored, len(history) + 2)]
    return [*_system(row, turns), *turns]


def _reasoning(row: dict[str, Any]) -> dict[str, Any]:
    """Return the columns of a row that hold the reasoning of its answer."""
    return {name: row[name] for name in REASONING[:2] if row.get(name)}


def _question(row: dict[str, Any], column: str) -> str:
    """Return the user's text; Alpaca's `input` follows its `instruction`."""
    if column == "instruction" and row.get("input"):
        return f"{_text(row, column)}\n\n{_text(row, 'input')}"
    return _text(row, column)


def _history(row: dict[str, Any]) -> list[Message]:
    """Return the earlier turns of an Alpaca row: `history` is a list of [question, answer]."""
    pairs = row.get("history") or []
    if isinstance(pairs, str):
        pairs = listed(pairs, "its history is", PAIR, of=list)
    turns = [{"role": role, "content": text} for pair in pairs for role, text in _pair(pair)]
    return list(read_turns(turns, ()))


def _pair(pair: Any) -> list[tuple[str, Any]]:
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        raise FaultyRow(f"its history has {pair!r:.80}; give a list of pairs [question, answer]")
    return [("user", pair[0]), ("assistant", pair[1])]


def _system(row: dict[str, Any], turns: list[Message]) -> list[Message]:
    """Return the turn of the row's `system` column, or [] if there is none or the chat begins with the same one."""
    if not row.get("system"):
        return []
    system = {"role": "system", "content": _text(row, "system")}
    if turns and turns[0]["role"] == "system":
        if turns[0]["content"] != system["content"]:
            raise FaultyRow("its column system differs from the chat's system turn; leave one of them out")
        return []
    return [system]


def _text(row: dict[str, Any], column: str) -> str:
    value = row[column]
    if value is None or (isinstance(value, str) and not value.strip()):
        raise FaultyRow(f"its {column} is empty; give it text, or remove the row")
    if not isinstance(value, str):
        raise FaultyRow(f"its {column} is no text, but {value!r:.80}; write it as text")
    check_characters(value, f"its {column}")
    return value


def _turns_of(row: dict[str, Any], column: str, role: str, ignored: Collection[str]) -> list[Message]:
    """Return a turn, a list of turns, or text as one turn of `role`. CSV holds a list as JSON."""
    value = row[column]
    if isinstance(value, str) and not value.lstrip().startswith("[{"):
        return [{"role": role, "content": _text(row, column)}]
    if isinstance(value, dict):
        value = [value]
    turns = list(read_turns(listed(value, f"its {column} is text, or"), ignored))
    if not turns:
        raise FaultyRow(f"its {column} is empty; give it text, or remove the row")
    return turns


def _common(one: list[Message], other: list[Message]) -> list[Message]:
    """Return the turns with which both chats begin, except for the last turn of either, which is an answer."""
    count = 0
    while count < min(len(one), len(other)) - 1 and one[count] == other[count]:
        count += 1
    return one[:count]
