"""The model of a GGUF file is the one that was written, and its adapters run in llama.cpp."""

import copy
import random
from functools import partial
from pathlib import Path
from statistics import median_low
from typing import Any

import gguf
import pytest
import torch
from gguf.quants import dequantize
from gguf_models import FAMILIES, PROMPTS, LlamaCpp, furthest, log_probs, tiny, write_gguf
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from peftcore import GgufError, LoraConfig, calibrate_rounding, get_peft_model, load_gguf_base, save_gguf_base
from peftcore.bases import GgufLinear
from peftcore.export import export_gguf_lora
from peftcore.gguf_files import model as gguf_model
from peftcore.gguf_files.header import GgufTensor, read_gguf_header

LOADED = ("llama", "mistral", "qwen2", "qwen3", "phi3")
FLIPS = 20
SIZES = {"intermediate_size": 64}
IDS = torch.tensor([[5, 9, 33, 2, 60, 17]])


def file_of(tmp_path: Path, family: str = "llama", kind: str = "Q4_1", **options: Any) -> tuple[Any, Path]:
    """A tiny model and its file, with matrices of the type `kind`."""
    model = tiny(family, **{**SIZES, **options})
    return model, write_gguf(model, tmp_path / "base.gguf", kind=kind)


def dequantised(model: Any, path: Path) -> Any:
    """The model with the weights of the file, as the `gguf` package dequantises them."""
    plain = copy.deepcopy(model)
    values = {t.name: torch.tensor(dequantize(t.data, t.tensor_type)) for t in gguf.GGUFReader(path).tensors}
    layout = gguf_model.layout_of_metadata(read_gguf_header(path).metadata.get, values)
    for name, parameter in plain.named_parameters():
        key = str(layout.names.get_name(name, (".weight", ".bias")))
        if parameter.ndim == 2:
            parameter.data = layout.from_file(key.removesuffix(".weight"), values[key])
    return plain


@pytest.mark.parametrize("family", LOADED)
def test_each_family_computes_what_its_file_says(family: str, tmp_path: Path) -> None:
    model, path = file_of(tmp_path, family)
    loaded = load_gguf_base(path)
    assert type(loaded) is type(model) or family == "mistral"  # llama.cpp calls its files llama
    packed = [module for module in loaded.modules() if isinstance(module, GgufLinear)]
    assert len(packed) == (8 if family == "phi3" else 14)
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, dequantised(model, path)(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_files_that_are_not_quantised_give_plain_layers(kind: str, tmp_path: Path) -> None:
    model, path = file_of(tmp_path, kind=kind)
    loaded = load_gguf_base(path)
    assert not [module for module in loaded.modules() if isinstance(module, GgufLinear)]
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, dequantised(model, path)(IDS).logits, rtol=1e-5, atol=1e-5)


def test_head_and_embeddings_are_dense_and_tied_as_in_the_file(tmp_path: Path) -> None:
    model, path = file_of(tmp_path, tie_word_embeddings=True)
    loaded: Any = load_gguf_base(path, torch.bfloat16)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.lm_head.weight.dtype == loaded.model.norm.weight.dtype == torch.bfloat16
    query = loaded.model.layers[0].self_attn.q_proj
    assert (
        query.weight.dtype == torch.uint8 and query.weight.numel() == 32 * 20 and query.compute_dtype == torch.bfloat16
    )
    torch.testing.assert_close(loaded(IDS).logits.float(), dequantised(model, path)(IDS).logits, rtol=0.1, atol=0.3)


def test_dequantised_it_is_an_ordinary_model(tmp_path: Path) -> None:
    model, path = file_of(tmp_path)
    loaded: Any = load_gguf_base(path)
    with pytest.raises(ValueError, match="not serializable"):
        loaded.save_pretrained(tmp_path / "packed")
    plain = loaded.dequantize(torch.float32)
    plain.save_pretrained(tmp_path / "plain")
    read = type(model).from_pretrained(tmp_path / "plain")
    assert type(read.model.layers[0].mlp.up_proj) is torch.nn.Linear
    torch.testing.assert_close(read(IDS).logits, dequantised(model, path)(IDS).logits)


def test_a_model_with_adapters_is_dequantised_under_them(tmp_path: Path) -> None:
    _, path = file_of(tmp_path)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model: Any = get_peft_model(load_gguf_base(path), config).eval()
    before = model(IDS).logits
    model.dequantize(torch.float32)
    assert not [module for module in model.modules() if isinstance(module, GgufLinear)]
    torch.testing.assert_close(model(IDS).logits, before, rtol=1e-4, atol=1e-4)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(IDS).logits, before, rtol=1e-4, atol=1e-4)


def test_a_head_for_classes_is_new_and_the_body_is_the_files(tmp_path: Path) -> None:
    _, path = file_of(tmp_path)
    config = load_gguf_base(path).config
    config.num_labels, config.pad_token_id = 3, 0
    loaded: Any = load_gguf_base(path, model_class=AutoModelForSequenceClassification, config=config)
    assert loaded.score.weight.shape == (3, 32) and 0 < loaded.score.weight.std() < 1
    assert isinstance(loaded.model.layers[1].mlp.down_proj, GgufLinear)
    assert loaded(IDS).logits.isfinite().all()


# -- bad input -------------------------------------------------------------------------------------------------------


def test_a_type_that_is_not_supported_is_named_with_those_that_are() -> None:
    header = gguf_model.GgufHeader(Path("x.gguf"), 100, {}, {}, {}, slice(0))
    with pytest.raises(GgufError, match=r"blk\.0 is of type Q2_K; supported: F32, F16, BF16, Q4_0, .*Q6_K"):
        gguf_model._check_tensor(header, "blk.0", GgufTensor((2, 256), 10, 0))
    with pytest.raises(GgufError, match="number 999"):
        gguf_model._check_tensor(header, "blk.0", GgufTensor((2, 256), 999, 0))


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (GgufTensor((2, 33), 3, 0), "rows of t have 33 weights, and a block of Q4_1 has 32"),
        (GgufTensor((2**40, 2**20), 3, 0), "truncated or damaged: t ends at byte"),
        (GgufTensor((5,), 0, 90), "truncated or damaged: t ends at byte 110, and the file has 100"),
        (GgufTensor((0, 32), 3, 0), r"t has the shape \[0, 32\]"),
        (GgufTensor((), 0, 0), r"t has the shape \[\]"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(tensor: GgufTensor, message: str) -> None:
    with pytest.raises(GgufError, match=message):
        gguf_model._check_tensor(gguf_model.GgufHeader(Path("x.gguf"), 100, {}, {}, {}, slice(0)), "t", tensor)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    _, path = file_of(tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(GgufError, match=r"truncated or damaged: .* ends at byte"):
        load_gguf_base(path)


def edited(path: Path, old: str, new: str) -> Path:
    """The file with a text of its header replaced by one of the same length."""
    content = path.read_bytes()
    assert old.encode() in content and len(old) == len(new)
    path.write_bytes(content.replace(old.encode(), new.encode()))
    return path


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("blk.0.attn_q.weight", "blk.0.attn_z.weight", "lacks|holds"),
        ("output_norm.weight", "output_nrom.weight", "lacks|holds"),
        ("llama.block_count", "llama.block_kount", "block_count of this llama file is None"),
        ("llama.embedding_length", "llama.embedding_lenght", "damaged|describes no model"),
    ],
)
def test_a_file_whose_parts_do_not_fit_is_refused(old: str, new: str, message: str, tmp_path: Path) -> None:
    _, path = file_of(tmp_path)
    with pytest.raises(GgufError, match=message):
        load_gguf_base(edited(path, old, new))


@pytest.mark.parametrize("family", sorted({*FAMILIES} - {*LOADED}))
def test_other_architectures_are_refused(family: str, tmp_path: Path) -> None:
    path = write_gguf(tiny(family), tmp_path / "base.gguf")
    with pytest.raises(GgufError, match=rf"'{family}' file cannot be loaded .* supported: llama, phi3, qwen2, qwen3"):
        load_gguf_base(path)
    edited(path, family, "x" * len(family))
    with pytest.raises(GgufError, match=r"'x+' is not supported; supported: .*llama"):
        load_gguf_base(path)


def test_a_flipped_byte_of_the_header_is_harmless_or_named(tmp_path: Path) -> None:
    _, path = file_of(tmp_path)
    whole = path.read_bytes()
    end, draw = min(t.offset for t in read_gguf_header(path).tensors.values()), random.Random(0)
    refused = 0
    for _ in range(FLIPS):
        place = draw.randrange(end)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << draw.randrange(8))]) + whole[place + 1 :])
        try:
            load_gguf_base(path)
        except GgufError:
            refused += 1
    assert FLIPS / 4 < refused < FLIPS


@pytest.mark.parametrize("claim", ["block_count", "embedding_length", "attention.key_length", "context_length"])
def test_no_size_in_the_metadata_is_believed(claim: str, tmp_path: Path) -> None:
    _, path = file_of(tmp_path)
    content, key = path.read_bytes(), f"llama.{claim}".encode()
    place = content.index(key) + len(key) + 4
    path.write_bytes(content[:place] + (2**31 - 2).to_bytes(4, "little") + content[place + 4 :])
    if claim == "context_length":  # costs nothing
        load_gguf_base(path)
        return
    with pytest.raises(GgufError, match=r"damaged|only whole heads|describes no model"):
        load_gguf_base(path)


# -- llama.cpp -------------------------------------------------------------------------------------------------------

CLOSE = 1e-4
ROUNDED = 0.2
"""Largest difference of log-probabilities by llama.cpp's rounding of inputs; the models are random, so it is large."""


def round_inputs(model: Any) -> None:
    """Let packed layers round their inputs as llama.cpp does: 32 at a time to 8 bits, and their sums to 16."""

    def product(layer: GgufLinear, args: tuple[Tensor, ...], _: Tensor) -> Tensor:
        blocks = args[0].unflatten(-1, (-1, 32))
        step = blocks.abs().amax(-1, keepdim=True) / 127
        codes = torch.where(step > 0, (blocks / step).round(), 0)
        rounded = codes * step.half().float()
        y = F.linear(rounded.flatten(-2), layer.dequantized())
        offset = layer.format.unpack(layer.weight)[3]
        if offset is None:
            return y
        sums = (codes.sum(-1) * step.squeeze(-1)).half().float()  # what the offsets of Q4_1 and Q5_1 are multiplied by
        return y + (sums - rounded.sum(-1)) @ offset[:, 0, 0]

    for module in model.modules():
        if isinstance(module, GgufLinear):
            module.register_forward_hook(product)


def typical(one: Any, other: Any) -> float:
    """The median over prompts of the largest difference: an input on the edge of two codes changes one prompt."""
    return median_low(float((one(prompt) - other(prompt)).abs().max()) for prompt in PROMPTS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["F32", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_an_adapter_says_in_llama_cpp_what_it_says_on_the_packed_base(kind: str, tmp_path: Path) -> None:
    path = write_gguf(tiny("llama", **SIZES), tmp_path / "base.gguf", kind=kind, ends=False)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model: Any = get_peft_model(load_gguf_base(path), config).eval()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    there, here = LlamaCpp(path, export_gguf_lora(model, "default", tmp_path / "lora.gguf")), partial(log_probs, model)
    base = partial(there.log_probs, scale=0)
    assert furthest(there.log_probs, here) < (CLOSE if kind == "F32" else ROUNDED)
    round_inputs(model)
    assert typical(there.log_probs, here) < CLOSE
    with model.disable_adapter():
        assert typical(base, here) < CLOSE
        assert furthest(there.log_probs, here) > 1  # the adapter has an effect


@pytest.mark.parametrize(("family", "kind"), [("llama", "Q4_0"), ("qwen2", "Q4_1"), ("phi3", "Q8_0")])
def test_a_calibrated_base_is_saved_as_a_gguf_file(family: str, kind: str, tmp_path: Path) -> None:
    """The file that is read back has the calibrated weights, and its logits are nearer to those before quantising."""
    model, source = file_of(tmp_path, family, kind)
    model.save_pretrained(tmp_path / "original")
    loaded: Any = load_gguf_base(source)
    torch.manual_seed(0)
    batches = [{"input_ids": torch.randint(model.config.vocab_size, (8, 32))} for _ in range(8)]
    calibrate_rounding(loaded, batches, tmp_path / "original", progress=False)
    save_gguf_base(loaded, source, tmp_path / "calibrated.gguf")
    before, after = load_gguf_base(source), load_gguf_base(tmp_path / "calibrated.gguf")
    held_out = torch.randint(model.config.vocab_size, (16, 32))
    with torch.no_grad():
        assert torch.equal(after(held_out).logits, loaded(held_out).logits)
        exact, ours, theirs = (one(held_out).logits for one in (model.eval(), after, before))
    assert (ours - exact).norm() < 0.95 * (theirs - exact).norm()
    readers = [gguf.GGUFReader(path) for path in (source, tmp_path / "calibrated.gguf")]
    changed = {a.name for a, b in zip(*(r.tensors for r in readers), strict=True) if (a.data != b.data).any()}
    assert changed and all(name.startswith("blk.") for name in changed)


def test_only_the_models_own_file_can_be_written_anew(tmp_path: Path) -> None:
    _, source = file_of(tmp_path)
    loaded: Any = load_gguf_base(source)
    foreign = write_gguf(tiny("llama", intermediate_size=32), tmp_path / "foreign.gguf", kind="Q4_1")
    (tmp_path / "out.gguf").write_bytes(b"earlier")
    with pytest.raises(GgufError, match=r"has no Q4_1 tensor \[64, 32\] for model\.layers\.0\.mlp"):
        save_gguf_base(loaded, foreign, tmp_path / "out.gguf")
    with pytest.raises(GgufError, match="this LlamaForCausalLM has no packed layers; give a model of load_gguf_base"):
        save_gguf_base(loaded.dequantize(torch.float32), source, tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_bytes() == b"earlier" and len(list(tmp_path.iterdir())) == 3
