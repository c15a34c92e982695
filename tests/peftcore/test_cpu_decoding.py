"""`peftcore.cpu_decoding`: models compute what they computed before, and what does not fit stays as it is."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from peftcore import AdaptionPromptConfig, LNTuningConfig, LoraConfig, cpu_decoding, get_peft_model
from peftcore.compiled import attention as compiled_attention
from peftcore.compiled.library import library
from peftcore.cpu_decoding import ATTENTION, CompiledRMSNorm, use_compiled_code

needs_compiler = pytest.mark.skipif(not library(), reason="nothing is compiled here; the log says why")
SIZES: dict[str, Any] = {
    **{"vocab_size": 80, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
}
KINDS: dict[str, tuple[dict[str, Any], int, bool]] = {
    "llama": ({}, 5, True),
    "mistral": ({"sliding_window": 4}, 5, True),
    "qwen3": ({}, 9, True),
    "gemma3_text": ({"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}, 0, True),
    "gpt_neox": ({}, 0, True),  # but it rotates only a part of each head, so that its own function does the work
    "cohere": ({}, 0, False),
}
"""{kind: (further sizes, number of norms of Llama's formula, whether its rotary embeddings are Llama's)}"""


def made(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**SIZES, **KINDS[kind][0])).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 2)
    return model.to(dtype)


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, CompiledRMSNorm) for module in model.modules())


def rotary_layers(model: nn.Module) -> int:
    """The number of attention layers with compiled rotary embeddings."""
    return sum(hasattr(type(module), "plain_class") for module in model.modules())


TOKENS = torch.randint(1, 80, (3, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 9, [0] * 4 + [1] * 5, [0] + [1] * 8])


@torch.no_grad()
def decoded(model: Any, mask: torch.Tensor) -> torch.Tensor:
    """Logits of each row's last tokens, token by token."""
    cache, logits = DynamicCache(config=model.config), []
    for start, end in ((0, 5), (5, 6), (6, 7), (7, 8), (8, 9)):
        given = {"attention_mask": mask[:, :end], "position_ids": (mask[:, :end].cumsum(1) - 1).clamp(0)[:, start:]}
        given |= {"cache": cache, "use_cache": True}
        logits.append(model(TOKENS[:, start:end], **given).logits[:, -1])
    return torch.stack(logits)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_models_compute_what_they_computed(
    kind: str, masked: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, mask = made(kind, dtype), MASK if masked else torch.ones_like(MASK)
    expected, calls, rotations = decoded(model, mask), [], []
    use_compiled_code(model)
    assert norms(model) == KINDS[kind][1] and model.config._attn_implementation == ATTENTION
    assert rotary_layers(model) == 2 * KINDS[kind][2]
    function, rotate = compiled_attention.compiled(), cpu_decoding.rotate_positions
    monkeypatch.setattr(compiled_attention, "compiled", lambda: calls.append(1) or function)
    monkeypatch.setattr(cpu_decoding, "rotate_positions", lambda *four: rotations.append(1) or rotate(*four))
    tolerance = 1e-5 if dtype == torch.float32 else 2**-5
    torch.testing.assert_close(decoded(model, mask), expected, rtol=tolerance, atol=tolerance)
    assert len(calls) == 5 * 2  # of each layer: the prompt, and four tokens
    assert len(rotations) == 5 * rotary_layers(model)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_whole_texts(dtype: torch.dtype) -> None:
    model = made("llama", dtype)
    expected = [model(TOKENS, attention_mask=mask).logits for mask in (None, MASK)]
    use_compiled_code(model)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-6
    for mask, logits in zip((None, MASK), expected, strict=True):
        visible = torch.ones_like(MASK).bool() if mask is None else mask.bool()
        found = model(TOKENS, attention_mask=mask).logits
        torch.testing.assert_close(found[visible], logits[visible], rtol=tolerance, atol=tolerance)


@needs_compiler
def test_gradients_are_computed_as_before() -> None:
    model, gradients = made("llama"), []
    for _ in range(2):
        model.zero_grad()
        model(TOKENS, labels=TOKENS).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
        use_compiled_code(model)
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@needs_compiler
def test_copies_files_and_adapters(tmp_path: Any) -> None:
    model, plain = made("llama"), made("llama")
    use_compiled_code(model)
    mask = torch.ones_like(MASK)
    expected = decoded(model, mask)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert norms(copied) == 5 and rotary_layers(copied) == 2 and torch.equal(decoded(copied, mask), expected)
    model.save_pretrained(tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa" and norms(loaded) == rotary_layers(loaded) == 0
    assert all(torch.equal(*pair) for pair in zip(loaded.parameters(), model.parameters(), strict=True))
    for config in (LoraConfig(target_modules="all-linear", init_lora_weights=False), LNTuningConfig()):
        outputs = []
        for base in (model, plain):
            torch.manual_seed(1)
            adapted: Any = get_peft_model(copy.deepcopy(base), config).eval()
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.data.add_(0.1)
            outputs.append(decoded(adapted, mask))
        torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(outputs[0], expected, atol=1e-2)


class WithAttributeRMSNorm(LlamaRMSNorm):
    """Its forward reads an attribute of its own."""

    __module__ = "transformers.models.other"

    def __init__(self) -> None:
        super().__init__(32)
        self.factor = 1.0

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return LlamaRMSNorm.forward(self, hidden_states) * self.factor


class WithGateRMSNorm(LlamaRMSNorm):
    """Its forward takes more than x."""

    __module__ = "transformers.models.other"

    def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        return LlamaRMSNorm.forward(self, hidden_states if gate is None else hidden_states * gate)


class SquaredRMSNorm(LlamaRMSNorm):
    """It computes something else."""

    __module__ = "transformers.models.other"

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return LlamaRMSNorm.forward(self, hidden_states).square()


class SuperRMSNorm(LlamaRMSNorm):
    """Its forward is bound to its class."""

    __module__ = "transformers.models.other"

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states)


@needs_compiler
@torch.no_grad()
def test_norms_are_known_by_what_they_compute() -> None:
    x, several = torch.randn(2, 1, 32), torch.randn(2, 3, 32)
    norms = WithAttributeRMSNorm(), WithGateRMSNorm(32), SquaredRMSNorm(32), SuperRMSNorm(32)
    for norm, fits in zip(norms, (True, False, False, False), strict=True):
        model, expected = made("llama"), (norm(x), norm(several))
        model.model.norm = norm
        use_compiled_code(model)
        assert isinstance(model.model.norm, CompiledRMSNorm) == fits
        for given, output in zip((x, several), expected, strict=True):
            torch.testing.assert_close(model.model.norm(given), output)


@needs_compiler
@torch.no_grad()
def test_norms_with_hooks_and_in_other_types_stay() -> None:
    model, hooked, other = made("llama"), made("llama"), made("llama").double()
    hooked.model.norm.register_forward_hook(lambda *_: None)
    model.model.norm.forward = model.model.norm.forward  # as accelerate does
    for one, count in ((model, 4), (hooked, 4), (other, 0)):
        use_compiled_code(one)
        assert norms(one) == count


@needs_compiler
def test_layers_of_other_models_rotate_as_before() -> None:
    """The module of the layer's class, which all models of the process share, does not change."""
    model, other = made("llama"), made("llama")
    function = modeling_llama.apply_rotary_pos_emb
    use_compiled_code(model)
    use_compiled_code(model)  # a second call changes nothing
    adapted: Any = get_peft_model(made("llama"), AdaptionPromptConfig(adapter_len=2, adapter_layers=1))
    use_compiled_code(adapted.get_base_model())  # it has the views of adapters already
    assert modeling_llama.apply_rotary_pos_emb is function and rotary_layers(other) == 0
    for layer in model.model.layers:
        assert type(layer.self_attn).__mro__[1] is modeling_llama.LlamaAttention


def test_other_attention_and_devices_stay() -> None:
    eager, elsewhere = made("llama"), made("llama").to("meta")
    eager.set_attn_implementation("eager")
    use_compiled_code(eager)
    assert eager.config._attn_implementation == "eager"
    use_compiled_code(elsewhere)
    assert elsewhere.config._attn_implementation == "sdpa" and norms(elsewhere) == 0
