"""Bases that cannot be exported are refused before a weight is read."""

from pathlib import Path
from typing import Any

import pytest
from gguf_folders import byte_level, saved
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from peftcore.export import ExportError, check_gguf_base, export_gguf_merged


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
