"""Hostile adapter folders: nothing of one is run, fetched or imported, and no claim in it takes memory or time."""

import contextlib
import json
import os
import re
import resource
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flows.registry.adapter_files import foreign_files, non_finite_tensors
from peftcore import CheckpointError, ConfigError, PeftConfig, PeftError, PeftModel
from peftcore._util.patterns import matched
from peftcore.files import damaged_files, read_manifest
from peftcore.files.tensors import parsed, read_tensors

WEIGHTS, CONFIG, MANIFEST = "adapter_model.safetensors", "adapter_config.json", "SHA256SUMS"
ENTRY: dict[str, Any] = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def tensors(header: Any, data: bytes = b"1234") -> memoryview:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return memoryview(bytearray(len(text).to_bytes(8, "little") + text + data))


def configured(folder: Path, **values: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    (folder / MANIFEST).unlink(missing_ok=True)


def refused(model: nn.Module, folder: Path, said: str, error: type[PeftError] = CheckpointError) -> None:
    """Soon, with a few words, and the model is as it was."""
    modules, begun = dict(model.named_modules()), time.monotonic()
    with pytest.raises(error, match=said) as raised:
        PeftModel.from_pretrained(model, folder)
    assert time.monotonic() - begun < 20 and len(str(raised.value)) < 2000
    assert dict(model.named_modules()) == modules


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_pickle_is_never_read_and_the_gate_refuses_it(bare: nn.Module, adapter: Path) -> None:
    payload = b"cposix\nsystem\n(S'touch ran'\ntR."
    (adapter / "adapter_model.bin").write_bytes(payload)
    assert foreign_files(adapter) == ["adapter_model.bin"]
    (adapter / WEIGHTS).rename(adapter / "elsewhere")
    (adapter / CONFIG).write_text("no JSON")  # would be said first, were it read
    refused(bare, adapter, "adapter_model.bin: a pickle can run code")
    assert not Path("ran").exists()


def test_a_save_that_was_not_finished_is_refused_by_the_gate(adapter: Path) -> None:
    (adapter / ".saved").mkdir()
    assert foreign_files(adapter) == [".saved"]


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, MANIFEST])
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), Path.mkdir])
def test_a_pipe_a_device_and_a_folder_are_not_read(
    name: str, make: Callable[[Path], None], bare: nn.Module, adapter: Path
) -> None:
    (adapter / name).unlink()
    make(adapter / name)
    refused(bare, adapter, f"{name}|not saved whole")
    assert foreign_files(adapter) == [name]


def test_the_gate_takes_no_links_sub_folders_or_names_that_a_terminal_obeys(adapter: Path, tmp_path: Path) -> None:
    (adapter / "README.md").unlink()
    (adapter / "README.md").symlink_to(tmp_path / "elsewhere")
    (adapter / "sub").mkdir()
    (adapter / "a\x1b[2J").touch()
    assert foreign_files(adapter) == ["'a\\x1b[2J'", "README.md", "sub"]
    (tmp_path / "link").symlink_to(adapter)
    assert foreign_files(tmp_path / "link") == [f"{tmp_path / 'link'} (no folder)"]


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "sub/../../secret", "a\0b", "a" * 300])
def test_a_manifest_reaches_no_file_outside(name: str, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (adapter.parent / "secret").write_text("s")
    (adapter / MANIFEST).write_text(f"{'0' * 64}  {name}\n")
    monkeypatch.setattr("peftcore.files.sha256", lambda path: pytest.fail(f"{path} was opened"))
    assert damaged_files(adapter) == [name]


@pytest.mark.parametrize("content", [b"no two spaces", b"\xff\xfe", b"a  b" * (5 << 20)])
def test_a_manifest_that_is_none_is_damaged(content: bytes, adapter: Path) -> None:
    (adapter / MANIFEST).write_bytes(content)
    assert read_manifest(adapter) == {MANIFEST: ""} and damaged_files(adapter) == [MANIFEST]


def test_a_hole_larger_than_memory_is_not_read(bare: nn.Module, adapter: Path) -> None:
    os.truncate(adapter / WEIGHTS, 1 << 42)
    refused(bare, adapter, "4,398,046,511,104 bytes, more than this machine's memory")


# -- tensors -----------------------------------------------------------------------------------------------------------

HEADERS: dict[str, memoryview] = {
    "a length of 2^63": memoryview(bytearray((1 << 63).to_bytes(8, "little") + b"{}")),
    "a header of 40 MB": tensors(b" " * 40_000_000),
    "nested a million deep": tensors(b'{"a":' * 1_000_000),
    "three million lists": tensors(b'{"a":[' + b"[]," * 3_000_000 + b"1]}"),
    "a name twice": tensors(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"I32","shape":[1],"data_offsets":[0,4]}}'
    ),
    "a field twice": tensors(b'{"a":{"dtype":"F32","dtype":"I32","shape":[1],"data_offsets":[0,4]}}'),
    "numbers of 4000 digits": tensors(
        b'{"a":{"dtype":"F32","shape":[' + b",".join([b"9" * 4000] * 1000) + b'],"data_offsets":[0,4]}}'
    ),
    "terabytes": tensors({"a": ENTRY | {"shape": [2**20, 2**20], "data_offsets": [0, 2**42]}}),
    "a product that overflows": tensors({"a": ENTRY | {"shape": [2**32, 2**32, 4]}}),
    "empty, of impossible size": tensors({"a": ENTRY | {"shape": [0, 2**70], "data_offsets": [0, 0]}}, b""),
    "another type": tensors({"a": ENTRY | {"dtype": "F64"}}),
    "overlapping": tensors({"a": ENTRY, "b": ENTRY}),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_takes_no_memory_for_what_it_claims(case: str) -> None:
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.thread_time()
    with pytest.raises(CheckpointError):
        parsed(HEADERS[case], Path("x"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # KiB
    assert time.thread_time() - begun < 10


def test_twenty_thousand_tensors_are_no_attack() -> None:
    many = {f"layers.{i}.lora_A": ENTRY | {"data_offsets": [4 * i, 4 * i + 4]} for i in range(20_000)}
    assert len(parsed(tensors(many, bytes(80_000)), Path("x"))) == 20_000


def test_the_gate_reads_no_hostile_header(adapter: Path) -> None:
    (adapter / WEIGHTS).write_bytes(HEADERS["terabytes"])
    ((said,), count) = non_finite_tensors(adapter)
    assert "not readable" in said and count == 0


@pytest.mark.parametrize("options", [{"r": 10**9}, {"rank_pattern": {"0": 10**9}}, {"r": 2**63}, {"r": 10**300}])
def test_a_rank_that_the_weights_do_not_have_takes_no_memory(
    options: dict[str, Any], bare: nn.Module, adapter: Path
) -> None:
    configured(adapter, **options)
    refused(bare, adapter, "no tensor in adapter_model.safetensors has more than 6")


def test_a_rank_below_that_is_refused_by_its_shape(bare: nn.Module, adapter: Path) -> None:
    configured(adapter, r=4000)
    refused(bare, adapter, "another base model")


# -- configurations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"peft_type": "LORA", "x": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"peft_type": "LORA", "lora_alpha": NaN}', "NaN is not a JSON number"),
        (b'{"peft_type": "LORA", "lora_alpha": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"peft_type": "LORA", "r": 8, "r": 16}', "a key is given twice"),
        (b'{"peft_type": "LORA", "r": ' + b"9" * 10_000 + b"}", "not valid JSON"),
        (b'{"peft_type": "LORA"}' + b" " * (17 << 20), "more than 16,777,216 bytes"),
        (b"\xff\xfe{}", "not valid JSON"),
    ],
)
def test_json_that_is_a_bomb_or_ambiguous(content: bytes, said: str, bare: nn.Module, adapter: Path) -> None:
    (adapter / CONFIG).write_bytes(content)
    refused(bare, adapter, said)


@pytest.mark.parametrize(
    "options",
    [
        {"lora_alpha": 10**400},
        {"rank_pattern": {"0": "8"}},
        {"rank_pattern": ["0"]},
        {"rank_pattern": {"(": 8}},
        {"rank_pattern": {"(?i)0": 8}},  # global flags stand first or nowhere
        {"rank_pattern": {f"{n}+": 8 for n in range(201)}},
        {"layers_to_transform": 0, "layers_pattern": "a)|(b"},
        {"layers_to_transform": ["0"]},
        {"layer_replication": [[0]]},
        {"layer_replication": [["0", 1]]},
        {"trainable_token_indices": {"0": ["x"]}},
        {"target_modules": "a{99999999999999}"},
        {"target_modules": "((((a{1000}){1000}){1000}){1000})"},  # `regex` would write it out
        {"target_modules": "(" * 5000 + "a" + ")" * 5000},
        {"target_modules": "a|" * 20_000},
    ],
)
def test_options_of_impossible_values(options: dict[str, Any], bare: nn.Module, adapter: Path) -> None:
    configured(adapter, **options)
    refused(bare, adapter, "Config|regular|layer_replication", PeftError)


SLOW = r"(?:(?:x|xx)+)+y"


def test_a_pattern_that_re_would_match_for_years_is_refused_in_a_second() -> None:
    begun = time.thread_time()
    with pytest.raises(ConfigError, match="to match the module paths"):
        matched(SLOW, "x" * 64)
    assert time.thread_time() - begun < 5


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "layers_pattern"])
def test_each_field_of_patterns_is_bounded(field: str, adapter: Path) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"x" * 64: nn.Linear(6, 6), "0": nn.Linear(6, 6), "1": nn.Linear(6, 6)})
    value = {SLOW: 2} if field == "rank_pattern" else SLOW
    options = {"layers_to_transform": 0} if field == "layers_pattern" else {}
    targets = {} if field == "target_modules" else {"target_modules": ["x" * 64, "0", "1"]}
    if field == "layers_pattern":
        model = nn.ModuleDict({"x" * 64: nn.ModuleList([nn.Linear(6, 6)])})
        targets = {"target_modules": ["0"]}
    configured(adapter, **{field: value} | options | targets)
    refused(model, adapter, "takes more than 0.5 s", ConfigError)


@pytest.mark.parametrize("pattern", [r".*\.(q|k)_proj", r"(?!.*visual).*layers\.\d+\.mlp\..*", "[a-z]+"])
def test_honest_patterns_match_as_they_do_in_re(pattern: str) -> None:
    for path in ("model.layers.0.mlp.up_proj", "visual.layers.0.mlp.up", "model.q_proj", "head"):
        assert bool(matched(pattern, path)) == bool(re.fullmatch(pattern, path))


def test_nothing_that_a_configuration_names_is_fetched_or_imported(
    bare: nn.Module, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *given, **_: pytest.fail(f"asked for {given}"))
    monkeypatch.setattr(socket.socket, "connect", lambda *given: pytest.fail(f"called {given}"))
    monkeypatch.syspath_prepend(adapter.parent)
    (adapter.parent / "evil_module.py").write_text("raise SystemExit('imported')")
    configured(
        adapter,
        base_model_name_or_path="http://127.0.0.1:9/evil",
        auto_mapping={"base_model_class": "Evil", "parent_library": "evil_module"},
        revision="../../x",
        megatron_core="evil_module",
    )
    with contextlib.suppress(ConfigError):  # of megatron
        PeftModel.from_pretrained(bare, adapter)
    assert "evil_module" not in sys.modules


@pytest.mark.parametrize("path", ["../../../etc", "/etc"])
def test_a_folder_elsewhere_gives_no_contents_away(path: str) -> None:
    with pytest.raises(CheckpointError, match="no adapter_config"):
        PeftConfig.from_pretrained(path)
    with pytest.raises(CheckpointError):
        read_tensors(Path(path))
