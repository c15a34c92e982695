"""Bases that cannot be exported are refused before a weight is read."""

from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_folders import byte_level, saved
from gguf_models import tiny, write_gguf
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from peftcore import LoraConfig, get_peft_model
from peftcore.export import ExportError, check_gguf_base, export_gguf_merged


def with_key(key: str, value: int, path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a Llama with one more number in its metadata."""
    plain = gguf.GGUFWriter

    def writer(*args: Any) -> gguf.GGUFWriter:
        made = plain(*args)
        (made.add_custom_alignment if key == "general.alignment" else partial(made.add_uint16, key))(value)
        return made

    with monkeypatch.context() as patched:
        patched.setattr(gguf, "GGUFWriter", writer)
        return write_gguf(tiny("llama"), path)


def test_a_base_with_another_alignment_gives_a_readable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = with_key("general.alignment", 1024, tmp_path / "base.gguf", monkeypatch)
    config = LoraConfig(r=2, target_modules=["o_proj"])  # B = 0 changes nothing
    file = export_gguf_merged(base, get_peft_model(tiny("llama"), config), tmp_path / "out.gguf", dtype="float32")
    old, new = ({tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors} for path in (base, file))
    assert old.keys() == new.keys() and all(np.array_equal(old[name], new[name]) for name in old)


def test_a_part_of_a_split_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = with_key("split.count", 2, tmp_path / "base-00001-of-00002.gguf", monkeypatch)
    with pytest.raises(ExportError, match="is one of 2 parts of a model; join them with llama-gguf-split --merge"):
        export_gguf_merged(base, get_peft_model(tiny("llama"), LoraConfig(target_modules=["o_proj"])), tmp_path / "out")


def test_what_cannot_be_written_is_said_before_a_weight_is_read(tmp_path: Path) -> None:
    def refused(said: str, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"not to be read")
        for check in (check_gguf_base, lambda base: export_gguf_merged(base, tmp_path, tmp_path / "out.gguf")):
            with pytest.raises(ExportError, match=said):
                check(folder)
        assert not (tmp_path / "out.gguf").exists()

    def folder(name: str, family: str = "llama", tokenizer: Tokenizer | None = None, **options: Any) -> Path:
        saved(tmp_path / name, family, tokenizer or byte_level("gpt-2"), **options)
        return tmp_path / name

    refused("'gemma' model cannot be exported.*llama, mistral, qwen2, qwen3.*--gguf", folder("gemma", "gemma"))
    refused("hidden_act='gelu'", folder("gelu", hidden_act="gelu"))
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 16}
    refused("rope_type='yarn'", folder("yarn", rope_parameters=yarn))
    (tmp_path / "gelu" / "tokenizer.json").unlink()
    lone = folder("lone")
    (lone / "tokenizer.json").unlink()
    refused("no tokenizer.json", lone)
    pieces = byte_level("gpt-2")
    pieces.pre_tokenizer = pre_tokenizers.Whitespace()
    refused("must end with ByteLevel", folder("whitespace", tokenizer=pieces))
    other = byte_level("qwen2")
    split = pre_tokenizers.Split(Regex(r"\d+"), "isolated")
    other.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    refused("no known name for its pre-tokenizer", folder("other", tokenizer=other))
    refused("its model is 'WordLevel'", folder("words", tokenizer=Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}))))
    with pytest.raises(ExportError, match="is not a folder"):
        check_gguf_base(tmp_path / "nowhere")
