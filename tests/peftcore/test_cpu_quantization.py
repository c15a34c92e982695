"""`peftcore.cpu_quantization`: bitsandbytes quantises by compiled code, with the same codes."""

import subprocess
import sys
from typing import Any

import bitsandbytes  # noqa: F401 - before a test replaces the function that it calls when it is imported
import pytest
import torch

from peftcore import cpu_quantization
from peftcore.compiled.quantization import compiled
from peftcore.cpu_quantization import use_compiled_quantization

needs_compiler = pytest.mark.skipif(not compiled(), reason="nothing is compiled here; the log says why")
SCRIPT = """
import bitsandbytes as bnb, torch
from peftcore import cpu_quantization

def quantized():
    torch.manual_seed(0)
    found = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for kind, storage in (("nf4", torch.uint8), ("fp4", torch.uint8), ("nf4", torch.bfloat16)):
            layer = bnb.nn.Linear4bit(96, 40, bias=False, quant_type=kind, quant_storage=storage)
            layer.load_state_dict({"weight": torch.randn(40, 96)})
            weight = layer.to(dtype).to("cpu").weight
            state = weight.quant_state
            values = bnb.functional.dequantize_4bit(weight, state)
            found.append([weight.data.view(torch.uint8), state.absmax, state.offset, values])
    return found

before, quantize, calls = quantized(), cpu_quantization.quantize_4bit, []
assert cpu_quantization.use_compiled_quantization() is cpu_quantization.use_compiled_quantization() is True
cpu_quantization.quantize_4bit = lambda *given: calls.append(1) or quantize(*given)
for one, other in zip(before, quantized(), strict=True):
    for tensor, same in zip(one, other, strict=True):
        assert tensor.dtype == same.dtype and torch.equal(tensor, same)
print(len(calls))
"""
"""In a process of its own, because code that is registered once stays."""


@needs_compiler
def test_layers_have_the_same_codes() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "9"


@needs_compiler
@pytest.mark.parametrize("obstacle", ["compiler", "own code", "other codes"])
def test_where_it_does_not_fit_bitsandbytes_keeps_its_code(
    obstacle: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    registered: list[Any] = []
    monkeypatch.setattr(torch.library, "register_kernel", lambda *given: registered.append(given))
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: obstacle == "own code")
    reason = "it has compiled code of its own"
    if obstacle == "compiler":
        monkeypatch.setattr(cpu_quantization, "compiled", lambda: None)
        reason = "nothing can be compiled here"
    if obstacle == "other codes":
        quantize = cpu_quantization.quantize_4bit
        monkeypatch.setattr(cpu_quantization, "quantize_4bit", lambda *given: (quantize(*given)[0] ^ 1, given[0]))
        reason = "the codes of this version differ"
    with caplog.at_level("INFO", "peftcore.cpu_quantization"):
        assert not use_compiled_quantization.__wrapped__()
    assert reason in caplog.text and not registered
