from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch

from flows.base.model import (
    EAGER_UP_TO,
    compute_dtype,
    load_dequantized,
    load_for_evaluation,
    load_for_serving,
    load_for_training,
    load_original,
    with_merged_dtype,
)
from flows.params import Quantization
from peftcore import MissingExtraError
from peftcore.bases import PackedCopyLinear, base_weight, fast_dtype
from peftcore.bases import compute_dtype as compute_dtypes
from peftcore.bases.packed_copy import packs_bfloat16
from peftcore.cpu_decoding import use_compiled_code

BFLOAT16_COPIES = 15 if packs_bfloat16() else 0
"""Layers of the tiny base that have a packed copy in bfloat16."""


def query(model: Any) -> Any:
    return model.model.layers[0].self_attn.q_proj


@pytest.mark.parametrize(("storage", "kind"), [("nf4", "nf4"), ("fp4", "fp4")])
@pytest.mark.parametrize("double", [True, False])
def test_four_bit_storage_is_what_was_asked_for(tiny_base: Path, storage: Any, kind: str, double: bool) -> None:
    layer = query(load_for_training(tiny_base, Quantization(storage=storage, double_quant=double), 100))
    assert isinstance(layer, bnb.nn.Linear4bit)
    assert layer.weight.quant_state.quant_type == kind and layer.weight.quant_state.nested == double
    assert layer.compute_dtype == fast_dtype(torch.bfloat16)


@pytest.mark.parametrize(("slow", "dtype"), [(False, torch.bfloat16), (True, torch.float32)])
def test_automatic_compute_dtype_follows_the_cpu(slow: bool, dtype: torch.dtype, monkeypatch: Any) -> None:
    monkeypatch.setattr(compute_dtypes, "_is_slow", lambda dtype: slow)
    assert compute_dtype(Quantization()) == dtype
    assert compute_dtype(with_merged_dtype(Quantization())) == torch.bfloat16
    for name, given in {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}.items():
        assert compute_dtype(Quantization(compute_dtype=name)) == given  # type: ignore[arg-type]
        assert compute_dtype(with_merged_dtype(Quantization(compute_dtype=name))) == given  # type: ignore[arg-type]


@pytest.mark.parametrize("storage", ["none", "nf4"])
@pytest.mark.parametrize(
    ("slow", "dtype", "copies"),
    [
        (False, "auto", BFLOAT16_COPIES),
        (False, "bfloat16", 0),
        (False, "float32", 0),
        (True, "auto", 15),
        (True, "float32", 0),
    ],
)
def test_a_served_base_has_packed_copies_if_its_dtype_is_automatic(
    tiny_base: Path, storage: Any, slow: bool, dtype: Any, copies: int, monkeypatch: Any
) -> None:
    monkeypatch.setattr(compute_dtypes, "_is_slow", lambda dtype: slow)
    model = load_for_serving(tiny_base, Quantization(storage=storage, compute_dtype=dtype))
    assert copied(model) == copies


@pytest.mark.parametrize("storage", ["none", "nf4"])
@pytest.mark.parametrize(("dtype", "copies"), [("bfloat16", BFLOAT16_COPIES), ("float32", 0)])
def test_an_evaluated_base_has_copies_with_the_same_values(
    tiny_base: Path, storage: Any, dtype: Any, copies: int, monkeypatch: Any
) -> None:
    monkeypatch.setattr(compute_dtypes, "_is_slow", lambda dtype: False)
    quantization = Quantization(storage=storage, compute_dtype=dtype)
    model, plain = load_for_evaluation(tiny_base, quantization), load_dequantized(tiny_base, quantization)
    assert copied(model) == copies
    use_compiled_code(plain)
    ids = torch.arange(3, 43).view(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits)


def copied(model: Any) -> int:
    """Number of layers with a packed copy."""
    return sum(isinstance(layer, PackedCopyLinear) for layer in model.modules())


def test_eight_bit_and_plain_storage(tiny_base: Path) -> None:
    assert isinstance(query(load_for_training(tiny_base, Quantization(storage="int8"), 100)), bnb.nn.Linear8bitLt)
    plain = load_for_training(tiny_base, Quantization(storage="none", compute_dtype="float32"), 100)
    assert type(query(plain)) is torch.nn.Linear and query(plain).weight.dtype == torch.float32


@pytest.mark.parametrize("storage", ["nf4", "fp4"])
def test_dequantised_weights_are_those_that_training_multiplies_by(tiny_base: Path, storage: Any) -> None:
    quantization = Quantization(storage=storage, compute_dtype="bfloat16")
    trained, plain = load_for_training(tiny_base, quantization, 100), load_dequantized(tiny_base, quantization)
    layer = query(trained)
    seen = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert type(query(plain)) is torch.nn.Linear and torch.equal(query(plain).weight, seen)
    x = torch.randn(5, 32, dtype=torch.bfloat16)
    torch.testing.assert_close(query(plain)(x), layer.train()(x))
    assert not torch.equal(query(plain).weight, query(load_original(tiny_base, torch.bfloat16)).weight)


def test_dequantised_int8_weights_are_near_the_original(tiny_base: Path) -> None:
    plain = load_dequantized(tiny_base, Quantization(storage="int8", compute_dtype="bfloat16"))
    original = query(load_original(tiny_base, torch.bfloat16)).weight
    assert type(query(plain)) is torch.nn.Linear
    torch.testing.assert_close(
        query(plain).weight.detach(), original.detach(), rtol=0.02, atol=float(original.detach().abs().max()) / 100
    )


@pytest.mark.parametrize(("storage", "package"), [("torchao_int8", "torchao"), ("hqq4", "hqq")])
def test_dequantised_weights_of_other_packages_are_those_of_training(
    tiny_base: Path, storage: Any, package: str
) -> None:
    pytest.importorskip(package)
    quantization = Quantization(storage=storage, compute_dtype="float32")
    trained, plain = load_for_training(tiny_base, quantization, 100), load_dequantized(tiny_base, quantization)
    assert base_weight(query(trained)).backend == package and not base_weight(trained.lm_head).quantized
    assert type(query(plain)) is torch.nn.Linear and not hasattr(plain.config, "quantization_config")
    x = torch.randn(5, 32)
    torch.testing.assert_close(query(plain)(x), query(trained)(x))
    assert not torch.equal(query(plain).weight, query(load_original(tiny_base, torch.float32)).weight)


def test_a_storage_whose_package_is_missing_says_what_to_install(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peftcore.errors.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"quantization\.storage: hqq4 needs hqq; .*'peftcore\[hqq\]'"):
        load_for_training(tiny_base, Quantization(storage="hqq4"), 100)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU always takes the fused kernel")
def test_short_rows_train_with_plain_attention_on_a_cpu(tiny_base: Path) -> None:
    short, long = (load_for_training(tiny_base, Quantization(), n) for n in (EAGER_UP_TO, EAGER_UP_TO + 1))
    assert short.config._attn_implementation == "eager" and long.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("storage", ["none", "nf4", "int8"])
def test_float16_computes_on_any_device(tiny_base: Path, storage: Any) -> None:
    model = load_for_training(tiny_base, Quantization(storage=storage, compute_dtype="float16"), 100)
    logits = model(torch.tensor([[1, 2, 3]], device=model.device)).logits
    assert logits.dtype == torch.float16 and logits.isfinite().all()
