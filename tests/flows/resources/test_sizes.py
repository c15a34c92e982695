"""Memory that does not depend on batches: bytes of storages and of the optimiser."""

from typing import Any

import pytest
import torch
from resource_cases import LINEARS_7B, llama_7b, params
from torch import Tensor

from flows.base.model import load_for_training
from flows.paths import Paths
from flows.resources import sizes as sizes_module
from flows.resources.sizes import base_on_meta, sizes, with_blocks
from flows.stages.detect import without_weights


def test_a_7b_llama_on_paper() -> None:
    size = sizes(llama_7b(), params(method={"r": 16}), 100)
    assert size.trainable == 39_976_960  # what every LoRA library prints for rank 16 on all linear layers of Llama-7B
    assert (size.adapters, size.gradients, size.optimizer) == (
        4 * size.trainable,
        4 * size.trainable,
        8 * size.trainable,
    )
    bits = 4 + 8 / 64 + 32 / (64 * 256)  # arXiv:2305.14314, section 3: double quantisation
    assert 8 * size.quantized / LINEARS_7B == pytest.approx(bits, rel=1e-3)
    # embedding and head, 65 norms, and in float32 the frequencies of the rotary embedding, once more as they started
    assert size.plain == 2 * (2 * 32000 * 4096 + 65 * 4096) + 2 * 4 * 64
    assert size.dequantized == 2 * 3 * 4096 * 11008 - 2 * 4096 * 11008  # gate and up read one input
    assert size.base_file == 2 * (LINEARS_7B + 2 * 32000 * 4096 + 65 * 4096)


def test_the_type_of_the_activations_is_measured_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(quantization: object) -> torch.dtype:
        assert torch.ones(1).device.type == "cpu"  # on the meta device, each type is fast
        return torch.float32

    monkeypatch.setattr(sizes_module, "compute_dtype", measured)
    assert next(base_on_meta(with_blocks(llama_7b(), 1), params()).parameters()).dtype == torch.float32


@pytest.mark.parametrize(
    ("quantization", "bits"),
    [({"double_quant": False}, 4.5), ({"storage": "int8"}, 8 + 32 * (5 * 4096 + 2 * 11008) / (LINEARS_7B / 32)),
     ({"storage": "none"}, 0)],
)  # fmt: skip
def test_bits_of_other_storages(quantization: dict[str, Any], bits: float) -> None:
    size = sizes(with_blocks(llama_7b(), 1), params(quantization=quantization), 100)
    assert 8 * size.quantized / (LINEARS_7B / 32) == pytest.approx(bits, rel=1e-4)


def test_an_8_bit_optimizer_keeps_a_quarter_and_its_scales() -> None:
    config = with_blocks(llama_7b(), 1)
    whole, small = (sizes(config, params(train={"optimizer": name}), 9).optimizer for name in ("adamw", "adamw_8bit"))
    assert small / whole == pytest.approx(1 / 4 + 1 / 256, rel=1e-3)


@pytest.mark.parametrize(
    "quantization",
    [{}, {"double_quant": False}, {"storage": "int8"}, {"storage": "none"}, {"storage": "torchao_int8"},
     {"storage": "hqq4"}],
)  # fmt: skip
def test_bytes_are_those_of_a_loaded_base(paths: Paths, quantization: dict[str, Any]) -> None:
    chosen = params(quantization=quantization)
    if package := {"torchao_int8": "torchao", "hqq4": "hqq"}.get(chosen.quantization.storage):
        pytest.importorskip(package)
    size = sizes(without_weights(paths.base).config, chosen, 10)
    model: Any = load_for_training(paths.base, chosen.quantization, 320)
    tensors: list[Tensor] = [getattr(p, "qdata", p) for p in (*model.parameters(), *model.buffers())]  # torchao's codes
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            tensors += [state.absmax, state.code]
            tensors += [state.state2.absmax, state.state2.code, state.offset] if state.nested else []
        elif type(module).__name__ == "Linear8bitLt":
            tensors.append(module.weight.SCB)
        elif type(getattr(module, "weight", None)).__name__ == "Int8Tensor":
            tensors += [module.weight.scale, module.weight.zero_point]
        elif type(module).__name__ == "HQQLinear":
            tensors += [module.meta["scale"], module.meta["zero"]]
    assert size.quantized + size.plain == sum(tensor.nbytes for tensor in tensors)
