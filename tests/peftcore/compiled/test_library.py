"""`peftcore.compiled.library`: the cache of compiled code, and where nothing can be compiled."""

import logging
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peftcore import LoraConfig, cpu_decoding, get_peft_model
from peftcore.compiled import attention, low_rank, norm, rotary
from peftcore.compiled import library as library_module
from peftcore.compiled.library import library, library_file
from peftcore.cpu_decoding import CompiledRMSNorm, use_compiled_code

pytestmark = pytest.mark.skipif(not library(), reason="nothing is compiled here; the log says why")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache of compiled code."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget()
    yield tmp_path / "peftcore"
    forget()


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that copies what the real one has made of the same files, half a second later."""
    program = tmp_path / "compiler"
    program.write_text(f'#!/bin/sh\nsleep 0.5\nwhile [ "$1" != -o ]; do shift; done\ncp "{library_file()}" "$2"\n')
    program.chmod(0o755)
    monkeypatch.setenv("CC", str(program))
    return program


def forget() -> None:
    """Look for compiled code again at the next use."""
    of_layers = cpu_decoding._with_compiled_rotary
    for found in (library, attention.compiled, low_rank.compiled, norm.compiled, rotary.compiled, of_layers):
        found.cache_clear()


def test_compiled_once(cache: Path) -> None:
    assert library() is not None
    (file,) = cache.iterdir()
    made = file.stat().st_mtime_ns
    assert not stat.S_IMODE(cache.stat().st_mode) & 0o077  # nobody else can put code there
    library.cache_clear()
    assert library() is not None
    assert [one.stat().st_mtime_ns for one in cache.iterdir()] == [made]


def test_cache_that_others_can_write_is_not_used(compiler: Path, cache: Path) -> None:
    assert library() is not None
    cache.chmod(0o777)
    library.cache_clear()
    assert library() is None


def test_processes_at_once(compiler: Path, cache: Path) -> None:
    code = "from peftcore.compiled.library import library; print(library() is not None)"
    running = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate()[0].strip() for process in running] == ["True"] * 3
    assert len(list(cache.iterdir())) == 1


def test_another_processor_compiles_again(compiler: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library()
    monkeypatch.setattr(library_module, "_processor", lambda: "another")
    library.cache_clear()
    assert library() is not None and len(list(cache.iterdir())) == 2


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("PEFTCORE_COMPILE", "0", ""),
        ("CC", "/no/such/compiler", "No such file"),
        ("CC", "false", "failed"),
        ("PATH", "/no/such/folder", "there is no C compiler"),
        ("XDG_CACHE_HOME", os.devnull, "Not a directory"),
    ],
)
@torch.no_grad()
def test_without_compiled_code(
    variable: str, value: str, reason: str, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    if variable != "CC":
        monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv(variable, value)
    with caplog.at_level(logging.INFO, "peftcore"):
        assert library() is None
    assert reason in caplog.text and bool(caplog.text) == bool(reason)
    model: Any = get_peft_model(
        nn.Sequential(nn.Linear(8, 6)), LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    ).eval()
    layer, x = model[0], torch.randn(2, 8)
    a, b, scaling = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
    torch.testing.assert_close(model(x), layer.base_layer(x) + scaling * x @ a.T @ b.T)

    config = LlamaConfig(vocab_size=9, hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    llama, ids = LlamaForCausalLM(config).eval(), torch.tensor([[3]])
    logits = llama(ids).logits
    use_compiled_code(llama)
    assert not any(isinstance(module, CompiledRMSNorm) for module in llama.modules())
    torch.testing.assert_close(llama(ids).logits, logits)
