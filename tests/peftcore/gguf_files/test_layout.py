"""The order of rows in GGUF files matters."""

from functools import partial
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf_models import LlamaCpp, adapted, furthest, log_probs, tiny, write_gguf

from peftcore.export import export_gguf_lora
from peftcore.injection.adapter_set import adapter_set

CLOSE = 1e-3
"""Log-probabilities; llama.cpp's GELU is a table of float16, the other families agree to 1e-5."""


def test_left_unpermuted_it_would_fail_silently(tmp_path: Path) -> None:
    base, model = write_gguf(tiny("llama"), tmp_path / "base.gguf"), adapted("llama")
    with torch.no_grad():
        for path, adapter in adapter_set(model).adapters("default").items():
            adapter.lora_B_weight.mul_(float("q_proj" in path or "k_proj" in path))
    right = export_gguf_lora(model, "default", tmp_path / "lora.gguf")
    wrong = gguf.GGUFWriter(tmp_path / "wrong.gguf", "llama")
    wrong.add_type("adapter")
    wrong.add_string("adapter.type", "lora")
    wrong.add_float32("adapter.lora.alpha", 0.0)
    for tensor in gguf.GGUFReader(right).tensors:
        turned = "attn_q" in tensor.name or "attn_k" in tensor.name
        heads = 4 if "attn_q" in tensor.name else 2
        values = torch.from_numpy(np.array(tensor.data))
        if turned and tensor.name.endswith("lora_b"):
            values = values.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        wrong.add_tensor(tensor.name, values.numpy())
    wrong.write_header_to_file()
    wrong.write_kv_data_to_file()
    wrong.write_tensors_to_file()
    wrong.close()
    here = partial(log_probs, model)
    assert furthest(LlamaCpp(base, right).log_probs, here) < CLOSE
    assert furthest(LlamaCpp(base, tmp_path / "wrong.gguf").log_probs, here) > 50 * CLOSE
