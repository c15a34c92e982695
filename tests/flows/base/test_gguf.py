"""A base that stays in its GGUF file's blocks: fetched, trained on, evaluated and merged."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from transformers import AutoModelForCausalLM, AutoTokenizer

from flows.base.gguf import FILE, holds_gguf
from flows.base.model import load_dequantized, load_for_training, load_original
from flows.commands.exporting import Format, export
from flows.errors import BaseModelError, StageError
from flows.params import Params, Quantization
from flows.paths import Paths
from flows.stages import detect, evaluate, fetch, merge, prepare, train
from peftcore import PeftModel
from peftcore.bases import GgufLinear
from peftcore.export.gguf_base import gguf_base
from peftcore.files import damaged_files

TinyParams = Callable[..., Params]
LOFTQ = {"init_lora_weights": "loftq"}
PACKED = Quantization(storage="gguf", compute_dtype="bfloat16")


def pack(folder: Path, file: Path, kind: str = "Q4_1") -> Path:
    """Write a transformers folder as a GGUF file with matrices of the type `kind`."""
    origin = gguf_base(folder)
    writer = gguf.GGUFWriter(file, origin.layout.architecture)
    origin.write_keys(writer)
    for tensor in origin.tensors:
        values = np.ascontiguousarray(tensor.values(), np.float32)
        stored = gguf.GGMLQuantizationType[kind if values.ndim == 2 else "F32"]
        writer.add_tensor(tensor.name, quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def with_merge(path: Path) -> None:
    """Give the byte-level tokenizer one merge, in place of a byte that no text here has: GGUF files need one."""
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["he"] = vocabulary.pop(max(vocabulary, key=lambda token: (len(token) == 1, token)))
    tokenizer["model"]["merges"] = [["h", "e"]]
    path.write_text(json.dumps(tokenizer))


@pytest.fixture
def paths(tmp_path: Path, tiny_base: Path) -> Paths:
    """`base.gguf` below `tmp_path`, and nothing fetched."""
    with_merge(tiny_base / "tokenizer.json")
    pack(tiny_base, tmp_path / "base.gguf")
    tiny_base.rename(tmp_path / "source")
    return Paths(tmp_path)


@pytest.fixture
def params(tiny_params: TinyParams) -> Params:
    return tiny_params(base={"source": "path:base.gguf"}, quantization={"storage": "gguf"})


def test_the_fetched_folder_holds_the_file_and_no_other_weights(paths: Paths, params: Params) -> None:
    fetch.run(params, paths)
    assert (paths.base / FILE).read_bytes() == (paths.root / "base.gguf").read_bytes()
    assert not list(paths.base.glob("*.safetensors")) and not damaged_files(paths.base)
    config = json.loads((paths.base / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and "quantization_config" not in config
    tokenizer = AutoTokenizer.from_pretrained(paths.base)
    assert tokenizer.chat_template and tokenizer.pad_token == "<|endoftext|>"
    assert json.loads((paths.base / "generation_config.json").read_text())["eos_token_id"] == tokenizer.eos_token_id


@pytest.mark.parametrize("storage", ["gguf", "none"])
def test_the_tokenizer_is_the_one_that_transformers_chooses(
    paths: Paths, tiny_params: TinyParams, storage: str, tmp_path: Path
) -> None:
    """The header is read by transformers once, for the configuration; AutoTokenizer would read it again."""
    fetch.run(tiny_params(base={"source": "path:base.gguf"}, quantization={"storage": storage}), paths)
    found: Any = AutoTokenizer.from_pretrained(paths.base)
    expected: Any = AutoTokenizer.from_pretrained(paths.root, gguf_file="base.gguf")
    assert found.backend_tokenizer.to_str() == expected.backend_tokenizer.to_str()
    assert found.chat_template == expected.chat_template and found.eos_token == expected.eos_token


def test_a_gguf_source_is_unpacked_for_another_storage(paths: Paths, tiny_params: TinyParams) -> None:
    fetch.run(tiny_params(base={"source": "path:base.gguf"}), paths)
    assert not holds_gguf(paths.base)
    model = AutoModelForCausalLM.from_pretrained(paths.base)
    tensor = next(t for t in gguf.GGUFReader(paths.root / "base.gguf").tensors if t.name == "blk.0.ffn_up.weight")
    expected = torch.tensor(dequantize(tensor.data, tensor.tensor_type)).bfloat16()
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, expected)


def test_training_sees_the_blocks_and_everything_else_their_values(paths: Paths, params: Params) -> None:
    fetch.run(params, paths)
    models: list[Any] = [load_for_training(paths.base, PACKED, 100), load_dequantized(paths.base, PACKED)]
    layer, plain = (model.model.layers[0].self_attn.q_proj for model in models)
    assert isinstance(layer, GgufLinear) and type(plain) is torch.nn.Linear
    assert torch.equal(plain.weight, layer.dequantized(torch.bfloat16))
    original: Any = load_original(paths.base, torch.float32)
    assert torch.equal(original.model.layers[0].self_attn.q_proj.weight, layer.dequantized())
    classes: Any = load_for_training(paths.base, PACKED, 100, ["a", "b", "c"])
    assert classes.config.id2label == {0: "a", 1: "b", 2: "c"} and classes.score.weight.shape[0] == 3


def test_a_base_that_was_fetched_for_another_storage_is_refused(paths: Paths, params: Params) -> None:
    with pytest.raises(BaseModelError, match=r"holds no model\.gguf.*run the fetch stage again"):
        load_for_training(paths.root / "source", PACKED, 100)
    fetch.run(params, paths)
    with pytest.raises(BaseModelError, match=r"holds a GGUF file.*run the fetch stage again"):
        load_for_training(paths.base, Quantization(), 100)


@pytest.mark.faults("flipped bit, truncated file, NaN")
def test_sources_that_cannot_be_used_are_refused(paths: Paths, params: Params, tiny_params: TinyParams) -> None:
    file = paths.root / "base.gguf"
    whole = file.read_bytes()
    scales = next(t for t in gguf.GGUFReader(file).tensors if t.name == "blk.1.attn_v.weight").data_offset
    infinite = whole[:scales] + b"\x00\x7c" + whole[scales + 2 :]
    unpacked = tiny_params(base={"source": "path:base.gguf"})
    for content, message in (
        (whole[:-100], "path:base.gguf: .*truncated or damaged"),
        (whole[:60], "path:base.gguf: .*truncated or damaged"),
        (b"no model", r"path:base\.gguf: .*is no GGUF file"),
        (infinite, "v_proj holds NaN|v_proj.weight holds NaN"),
    ):
        file.write_bytes(content)
        with pytest.raises(BaseModelError, match=message):
            fetch.run(params, paths)
        if content is not whole[:-100]:
            with pytest.raises(BaseModelError, match=r"path:base\.gguf"):
                fetch.run(unpacked, paths)
    with pytest.raises(BaseModelError, match=r"it is a transformers folder.*needs a GGUF file"):
        fetch.run(params.model_copy(update={"base": params.base.model_copy(update={"source": "path:source"})}), paths)
    assert not paths.base.exists()


@pytest.mark.slow
def test_a_run_trains_evaluates_and_writes_a_dequantised_merged_model(
    paths: Paths, params: Params, tmp_path: Path
) -> None:
    rows = [
        {"prompt": f"How much is {number} and 1?", "completion": f"{number + 1}.", "book": f"book{number // 4}"}
        for number in range(100)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for stage in (fetch, prepare, detect):
        stage.run(params, paths)
    assert json.loads(paths.architecture.read_text())["class_name"] == "LlamaForCausalLM"
    loftq = params.model_copy(update={"method": params.method.model_copy(update={"options": LOFTQ})})
    with pytest.raises(StageError, match="loftq, which needs the weights before quantisation"):
        train.run(loftq, paths)
    for stage in (train, evaluate, merge):
        stage.run(params, paths)
    report = json.loads(paths.merge_report.read_text())
    assert report["into"] == "dequantized" and report["candidates"].keys() == {"dequantized"}
    merged = AutoModelForCausalLM.from_pretrained(paths.merged).eval()
    adapted = PeftModel.from_pretrained(load_dequantized(paths.base, PACKED), paths.adapter)
    ids = torch.arange(3, 40)[None]
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=0.05, atol=0.05)
    for form, out in ((Format.GGUF_LORA, "lora.gguf"), (Format.GGUF_MERGED, "merged.gguf")):
        export(form, paths.adapter, paths.base, tmp_path / out, None, "float32", None, None)
        assert gguf.GGUFReader(tmp_path / out).tensors
