"""An adapter for other runtimes, and one message for what cannot be exported."""

import json
import shutil
from pathlib import Path

import pytest
from command_line import peftcore
from small_adapters import trained

from peftcore import LoHaConfig, LoraConfig
from peftcore.export import check_vllm


def test_an_adapter_for_each_runtime(tiny_base: Path, tmp_path: Path) -> None:
    config = LoHaConfig(target_modules=["q_proj", "up_proj"], r=2, init_weights=False)
    options = trained(tiny_base, config, tmp_path / "adapter")
    done = peftcore("export", "vllm", str(tmp_path / "vllm"), *options, "--rank", "4")
    assert done.exit_code == 0 and "--max-lora-rank 8; converted to LoRA of rank 4, relative error 0.00%" in done.stdout
    assert check_vllm(tmp_path / "vllm") == []
    done = peftcore("export", "gguf-lora", str(tmp_path / "lora.gguf"), *options, "--tolerance", "0.5")
    assert done.exit_code == 0 and (tmp_path / "lora.gguf").read_bytes()[:4] == b"GGUF"
    refused = peftcore("export", "vllm", str(tmp_path / "no"), *options)
    assert refused.exit_code == 1 and "error: LoHa is not low-rank" in refused.stderr
    assert not (tmp_path / "no").exists()


def test_a_whole_gguf_is_made_of_the_bases_folder_or_refused_before_work(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = trained(tiny_base, LoraConfig(target_modules=["q_proj"]), tmp_path / "adapter")
    done = peftcore("export", "gguf-merged", str(tmp_path / "whole.gguf"), *options)
    assert done.exit_code == 0, done.stderr
    refused = peftcore("export", "gguf-lora", str(tmp_path / "no"), *options, "--gguf", str(tmp_path / "whole.gguf"))
    assert refused.exit_code == 1 and "--gguf has no effect on gguf-lora" in refused.stderr
    other = shutil.copytree(tiny_base, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "gemma"}))
    monkeypatch.setattr("flows.commands.exporting._adapted", lambda *_: pytest.fail("the model was loaded"))
    refused = peftcore("export", "gguf-merged", str(tmp_path / "no"), "--adapter", options[1], "--base", str(other))
    assert refused.exit_code == 1 and "give the base's own GGUF file (--gguf)" in refused.stderr
    assert not (tmp_path / "no").exists()


def test_a_type_of_matrices_is_for_gguf_files_only(tiny_base: Path, tmp_path: Path) -> None:
    options = trained(tiny_base, LoraConfig(target_modules=["q_proj"]), tmp_path / "adapter")
    refused = peftcore("export", "vllm", str(tmp_path / "no"), *options, "--dtype", "float16")
    assert refused.exit_code == 1 and not (tmp_path / "no").exists()
    assert "--dtype has no effect on vllm, only on gguf-lora and gguf-merged; leave it out" in refused.stderr
    for name, given in (("default", []), ("float16", ["--dtype", "float16"]), ("float32", ["--dtype", "float32"])):
        assert peftcore("export", "gguf-lora", str(tmp_path / name), *options, *given).exit_code == 0
    sizes = {name: (tmp_path / name).stat().st_size for name in ("default", "float16", "float32")}
    assert sizes["default"] == sizes["float16"] < sizes["float32"]
