"""Whatever a model has for a head and does behind it, losses and gradients are those of its own logits."""

import copy
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BitsAndBytesConfig,
    Cohere2Config,
    Cohere2ForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    XLMConfig,
    XLMWithLMHeadModel,
)
from transformers.modeling_outputs import CausalLMOutput

from peftcore import LoraConfig, PromptTuningConfig, TrainingError, get_peft_model
from peftcore.train import supervised_head as module
from peftcore.train import supervised_logits, supervised_positions, token_losses

VOCABULARY = 60
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama(**options: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**(SIZES | options)))


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": llama,
    "tied llama": lambda: llama(tie_word_embeddings=True),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=3.0)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, final_logit_softcapping=2.0)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.3)),
    "cohere2": lambda: Cohere2ForCausalLM(Cohere2Config(**SIZES, logit_scale=1.9)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=1.7)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=40, bos_token_id=1)
    ),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(**{k: SIZES[k] for k in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")})
    ),
}


def batch(width: int = 12) -> tuple[dict[str, Tensor], Tensor]:
    """Three right-padded rows, a part of whose tokens is supervised; the first token never is."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (3, width), generator=generator)
    attention = torch.ones_like(ids)
    attention[1, width - 2 :] = attention[2, width - 4 :] = 0
    supervised = (torch.rand(3, width, generator=generator) < 0.4) & attention.bool()
    supervised[:, 0] = False
    return {"input_ids": ids, "attention_mask": attention}, ids.where(supervised, -100)


def with_lora(model: PreTrainedModel, **options: Any) -> Any:
    config = LoraConfig(r=4, **({"target_modules": "all-linear", "init_lora_weights": False} | options))
    return get_peft_model(model, config)


def own(model: nn.Module) -> Tensor:
    """Token losses from all of the model's own logits."""
    inputs, labels = batch()
    logits = model(**inputs).logits
    logits = logits[:, logits.shape[1] - labels.shape[1] : -1].flatten(0, 1)
    losses = F.cross_entropy(logits.double(), labels[:, 1:].flatten(), reduction="none")
    return losses[labels[:, 1:].flatten() != -100]


def gradients(model: nn.Module, losses: Tensor) -> dict[str, Tensor]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    return dict(zip(trained, torch.autograd.grad(losses.mean(), list(trained.values())), strict=True))


def assert_own(model: nn.Module, tolerance: float = 1e-10, forwards: int = 2) -> None:
    """The first batch is where a model is looked at, so the second one counts as well."""
    expected = own(model)
    slopes = gradients(model, expected)
    for _ in range(forwards):
        found, mask = token_losses(model, *batch())
        assert torch.equal(mask, supervised_positions(batch()[1]))
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
        for name, gradient in gradients(model, found).items():
            torch.testing.assert_close(gradient, slopes[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """Shapes of the hidden states whose losses were computed without logits."""
    from peftcore.train import head_hooks

    seen: list[tuple[int, ...]] = []
    real = head_hooks.linear_cross_entropy
    monkeypatch.setattr(
        head_hooks,
        "linear_cross_entropy",
        lambda hidden, *rest: seen.append(tuple(hidden.shape)) or real(hidden, *rest),
    )
    yield seen


def head_outputs(model: nn.Module) -> list[tuple[int, ...]]:
    """Filled with the shapes of what the output head gives from now on, without being a hook that stands in the way."""
    seen: list[tuple[int, ...]] = []
    forward = type(model).forward

    class Seen(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, logits_to_keep: int = 0, **kwargs: Any) -> Any:
            output = forward(self, *args, **kwargs)
            seen.append(tuple(output.logits.shape))
            return output

    model.__class__ = Seen
    return seen


# -- plain heads -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("training", [False, True])
def test_every_family_has_its_own_loss_without_logits(
    family: str, training: bool, computed: list[tuple[int, ...]]
) -> None:
    torch.manual_seed(0)
    model = with_lora(FAMILIES[family]()).double().train(training)
    for dropout in (m for m in model.modules() if isinstance(m, nn.Dropout)):
        dropout.p = 0.0
    model.config.attention_dropout = 0.0
    for name in ("attention_dropout", "dropout"):
        for part in model.modules():
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, 0.0)
    count = int((batch()[1] != -100).sum())
    assert_own(model)
    assert computed == [(count, 32)] * 2


def test_the_head_is_given_nothing_once_the_model_is_known() -> None:
    model = with_lora(llama()).double()
    shapes = head_outputs(model)
    token_losses(model, *batch())
    token_losses(model, *batch())
    assert shapes == [(1, 8, VOCABULARY), (1, 0, VOCABULARY), (1, 0, VOCABULARY)]


def test_a_whole_model_may_be_trained(computed: list[tuple[int, ...]]) -> None:
    for name in ("llama", "tied llama", "gemma2"):
        torch.manual_seed(0)
        assert_own(FAMILIES[name]().double())
    assert len(computed) == 6


def test_a_saved_copy_of_the_head_is_trained(computed: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    model = with_lora(llama(), modules_to_save=["lm_head"]).double()
    with torch.no_grad():
        model.lm_head.copies["default"].weight.add_(0.05)
    assert any("lm_head" in name and p.requires_grad for name, p in model.named_parameters())
    assert_own(model)
    assert len(computed) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "granite"])
def test_half_precision(family: str, dtype: torch.dtype, computed: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    model = FAMILIES[family]().to(dtype)
    with torch.no_grad():
        found, _ = token_losses(model, *batch())
        expected = own(model)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=2 * torch.finfo(dtype).eps)
    assert len(computed) == 1


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_autocast(family: str, computed: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    model = with_lora(FAMILIES[family]())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = own(model)
        found, _ = token_losses(model, *batch())
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-2)
    mine, theirs = (torch.cat([g.flatten() for g in gradients(model, losses).values()]) for losses in (found, expected))
    assert (mine - theirs).norm() / theirs.norm() < 0.03
    assert len(computed) == 1


def saved_shapes(model: nn.Module) -> list[tuple[int, ...]]:
    """Shapes of what a forward keeps for the backward, the model's own parameters apart."""
    own_storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        losses, _ = token_losses(model, *batch())
    shapes = [tuple(t.shape) for t in kept if t.untyped_storage().data_ptr() not in own_storages]
    del losses  # which keeps every storage alive until here
    return shapes


def test_no_logits_are_kept() -> None:
    model = with_lora(llama()).train()
    token_losses(model, *batch())
    shapes = saved_shapes(model)
    count = int((batch()[1] != -100).sum())
    assert (count, 32) in shapes
    assert not [shape for shape in shapes if VOCABULARY in shape and 0 not in shape]


# -- other heads -----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*share a weight, and the adapter changes:UserWarning")
def test_an_adapted_head_makes_the_logits_of_supervised_rows(computed: list[tuple[int, ...]]) -> None:
    for name in ("llama", "gemma2", "granite"):
        torch.manual_seed(0)
        model = with_lora(FAMILIES[name](), target_modules=["q_proj", "lm_head"]).double()
        assert_own(model)
        shapes = head_outputs(model)
        token_losses(model, *batch())
        token_losses(model, *batch())
        count = int((batch()[1] != -100).sum())
        assert shapes == [(1, 8, VOCABULARY), *[(1, count, VOCABULARY)] * 2]
    assert not computed


def test_an_adapted_head_is_plain_while_its_adapters_are_off(computed: list[tuple[int, ...]]) -> None:
    model = with_lora(llama(), target_modules=["q_proj", "lm_head"]).double()
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(token_losses(model, *batch())[0], own(model), rtol=1e-10, atol=1e-10)
    assert len(computed) == 1
    assert_own(model)
    assert len(computed) == 1


def test_a_quantised_body_with_a_plain_head(tmp_path: Path, computed: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    llama(hidden_size=64, intermediate_size=64, head_dim=16).save_pretrained(tmp_path)
    storage = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    base = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, quantization_config=storage)
    model = with_lora(base).train()
    assert_own(model, tolerance=1e-5)
    assert len(computed) == 2


def test_a_quantised_head(computed: list[tuple[int, ...]]) -> None:
    from bitsandbytes.nn import Linear4bit

    torch.manual_seed(0)
    base = llama(hidden_size=64, head_dim=16)
    packed = Linear4bit(64, VOCABULARY, bias=False, compute_dtype=torch.float32)
    packed.load_state_dict(base.lm_head.state_dict())
    base.lm_head = packed.to("cpu")
    assert_own(with_lora(base, target_modules=["q_proj"]).train(), tolerance=1e-5)
    assert not computed


def test_virtual_tokens_stand_before_the_text(computed: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    model = get_peft_model(llama().double(), PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")).double()
    assert_own(model)
    assert len(computed) == 2


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@pytest.mark.filterwarnings("ignore:.*past_key_values.*deprecated:FutureWarning")
def test_a_cache_is_extended_once(name: str, computed: list[tuple[int, ...]]) -> None:
    """The text begins in the cache; the losses of its end are those of the whole text, without other logits."""
    torch.manual_seed(0)
    model = with_lora(llama()).double().eval()
    ids, attention = batch()[0]["input_ids"], torch.ones(3, 12, dtype=torch.long)
    cache = DynamicCache(config=model.config)
    model(input_ids=ids[:, :7], cache=cache)
    mask = torch.ones(3, 5, dtype=torch.bool)
    inputs = {"input_ids": ids[:, 7:], "attention_mask": attention, name: cache}
    losses = module.supervised_losses(model, inputs, mask, ids[:, 7:].flatten())
    assert cache.get_seq_length() == 12 and len(computed) == 1
    expected = F.cross_entropy(model(input_ids=ids).logits[:, 7:].flatten(0, 1), ids[:, 7:].flatten(), reduction="none")
    torch.testing.assert_close(losses, expected)


def test_a_model_that_uses_its_head_otherwise_extends_no_cache_twice() -> None:
    torch.manual_seed(0)
    model, inputs = _HeadTwice(llama().config).eval(), batch()[0]
    mask = torch.ones(3, 12, dtype=torch.bool)
    with torch.no_grad():
        module.supervised_logits(model, inputs, mask)
        model.calls = 2
        assert module.supervised_logits(model, inputs, mask).shape == (36, VOCABULARY)
        cache = DynamicCache(config=model.config)
        with pytest.raises(TrainingError, match=r"_HeadTwice calls its output head otherwise .* give no cache"):
            module.supervised_logits(model, inputs | {"cache": cache}, mask)


class _HeadTwice(LlamaForCausalLM):
    """Calls its head `calls` times."""

    calls = 1

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        if self.calls > 1:
            self.lm_head(torch.zeros(3, 12, self.config.hidden_size))
        return output


# -- what nobody has heard of ----------------------------------------------------------------------------------


class _Shifted(LlamaForCausalLM):
    """Adds a constant to its logits."""

    def forward(self, *args: Any, logits_to_keep: int = 0, **kwargs: Any) -> Any:
        output = super().forward(*args, logits_to_keep=logits_to_keep, **kwargs)
        output.logits = output.logits + torch.linspace(0, 2, VOCABULARY, dtype=output.logits.dtype)
        return output


class _ByPosition(LlamaForCausalLM):
    """Adds something to its logits that depends on where they stand."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        count = output.logits.shape[1]
        output.logits = output.logits + torch.arange(count)[:, None] * torch.linspace(0, 1, VOCABULARY).double()
        return output


class _WholeRows(LlamaForCausalLM):
    """Cannot do with logits of some positions."""

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:  # type: ignore[override]
        output = super().forward(input_ids, **kwargs)
        output.logits = output.logits.view(*input_ids.shape, -1)
        return output


class _Twice(LlamaForCausalLM):
    """Calls its head once more, on something else."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + self.lm_head(torch.ones(1, 1, 32, dtype=output.logits.dtype))
        return output


class _Functional(LlamaForCausalLM):
    """Does not call its head as a module."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        states = self.model(*args, **kwargs).last_hidden_state
        return CausalLMOutput(logits=F.linear(states, self.lm_head.weight))


class _Unnamed(LlamaForCausalLM):
    """Does not say what its head is."""

    def get_output_embeddings(self) -> None:  # type: ignore[override]
        return None


@pytest.mark.parametrize(
    ("model_class", "message"),
    [
        (_Shifted, "_Shifted processes its logits in an unknown way; its output head runs at supervised positions"),
        (_ByPosition, "_ByPosition processes its logits in an unknown way; all logits are computed"),
        (_WholeRows, "_WholeRows does not accept single rows of hidden states"),
        (_Twice, "_Twice does not compute its logits by one call of its output head"),
        (_Functional, "_Functional does not compute its logits by one call of its output head"),
        (_Unnamed, None),
    ],
)
def test_an_unknown_forward_never_gives_a_wrong_loss(
    model_class: type[LlamaForCausalLM], message: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = with_lora(model_class(llama().config)).double()
    with caplog.at_level(logging.INFO, logger="peftcore.train.supervised_head"):
        assert_own(model)
    assert [record.levelname for record in caplog.records] == ["INFO"] * (message is not None)
    assert message is None or message in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_softcap_that_no_configuration_tells_of_is_seen_in_small_logits(
    dtype: torch.dtype, computed: list[tuple[int, ...]]
) -> None:
    class Capped(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = 20 * torch.tanh(output.logits / 20)
            return output

    torch.manual_seed(0)
    model = Capped(llama().config).to(dtype)
    assert model(**batch()[0]).logits.abs().max() < 1  # where the cap changes them by less than 0.1 %
    token_losses(model, *batch())
    computed.clear()
    token_losses(model, *batch())
    assert not computed


def test_a_scale_that_is_meant_the_other_way_round_is_found(computed: list[tuple[int, ...]]) -> None:
    class Multiplies(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * self.config.logits_scaling
            return output

    torch.manual_seed(0)
    model = Multiplies(llama().config)
    model.config.logits_scaling = 3.0  # Granite divides by it
    assert_own(with_lora(model).double())
    assert len(computed) == 2


def test_looking_at_a_model_draws_no_random_numbers() -> None:
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        model = with_lora(_ByPosition(llama(attention_dropout=0.3).config)).double().train()
        if results:  # known already
            module._AFTER_HEADS[model] = results[0][1]
        torch.manual_seed(1)
        losses, _ = token_losses(model, *batch())
        results.append((losses, copy.copy(module._AFTER_HEADS[model])))
        results[-1] += (torch.rand(()),)
    assert torch.equal(results[0][0], results[1][0]) and results[0][2] == results[1][2]


# -- hooks -----------------------------------------------------------------------------------------------------


def test_the_hooks_are_gone_whatever_happens() -> None:
    class Fails(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            super().forward(*args, **kwargs)
            raise OSError("disk")

    model = Fails(llama().config)
    with pytest.raises(OSError, match="disk"):
        token_losses(model, *batch())
    inputs, labels = batch()
    labels[0, 3] = VOCABULARY
    good = llama()
    with pytest.raises(TrainingError, match="targets range from"):
        token_losses(good, inputs, labels)
    for each in (model, good):
        assert not each.lm_head._forward_pre_hooks and not each.lm_head._forward_hooks
    assert_own(good.double())


def test_a_batch_that_fails_says_nothing_of_the_model(computed: list[tuple[int, ...]]) -> None:
    model = llama().double()
    inputs, labels = batch()
    with pytest.raises(IndexError):
        token_losses(model, inputs | {"input_ids": inputs["input_ids"] + VOCABULARY}, labels)
    assert_own(model)
    assert len(computed) == 2


def test_hooks_of_others_on_the_head_see_what_the_head_gives(computed: list[tuple[int, ...]]) -> None:
    model = llama().double()
    seen: list[Any] = []
    model.lm_head.register_forward_hook(lambda head, given, output: seen.append(output.shape))
    assert_own(model)
    assert not computed and seen[-1] == (1, int((batch()[1] != -100).sum()), VOCABULARY)


def test_a_compiled_model_is_left_alone(computed: list[tuple[int, ...]]) -> None:
    model = llama().double()
    compiled = torch.compile(model, backend="eager")
    assert module.is_compiled(compiled) and not module.is_compiled(model)
    torch.testing.assert_close(token_losses(compiled, *batch())[0], own(model), rtol=1e-10, atol=1e-10)
    assert not computed
    model.compile(backend="eager")
    assert module.is_compiled(model)


def test_checkpointed_activations(computed: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    model = with_lora(llama()).double().train()
    plain = gradients(model, token_losses(model, *batch())[0])
    model.activation_checkpointing_enable()
    model.enable_input_require_grads()
    for name, gradient in gradients(model, token_losses(model, *batch())[0]).items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-12, atol=1e-12)
    assert len(computed) == 2


# -- float16 ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*share a weight, and the adapter changes:UserWarning")
@pytest.mark.parametrize("trains", ["adapted head", "saved head", "softcapped"])
def test_rows_that_tell_of_the_model_leave_no_gradient_in_float16(trains: str) -> None:
    """A hidden state of 200 is fine in float16, and 512 times it is not: 0 times infinity is no gradient."""
    torch.manual_seed(0)
    base = FAMILIES["gemma2" if trains == "softcapped" else "llama"]()
    base.model.norm.weight.data.fill_(100.0)
    base.lm_head.weight.data.mul_(0.01)
    options: dict[str, Any] = {"target_modules": ["q_proj", "lm_head"]}
    if trains == "saved head":
        options = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    model = with_lora(base.half(), **options)
    losses, _ = token_losses(model, *batch())
    expected = gradients(model, own(model))
    for name, gradient in gradients(model, losses).items():
        assert gradient.isfinite().all(), name
        assert (gradient - expected[name]).norm() <= 0.02 * expected[name].norm(), name


# -- logits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [*FAMILIES.values(), lambda: _ByPosition(llama().config)])
def test_supervised_logits_are_the_models(make: Callable[[], PreTrainedModel]) -> None:
    torch.manual_seed(0)
    model = make().double().eval()
    inputs, labels = batch()
    mask = supervised_positions(labels)
    for _ in range(2):
        torch.testing.assert_close(
            supervised_logits(model, inputs, mask), model(**inputs).logits[mask], rtol=1e-10, atol=1e-10
        )


def test_fewer_logits_than_labels_are_refused() -> None:
    inputs, labels = batch()
    with pytest.raises(TrainingError, match="logits of 1 positions for 12 labels"):
        token_losses(llama(), inputs | {"logits_to_keep": 1}, labels)


def test_a_model_without_get_output_embeddings_is_fine() -> None:
    xlm = XLMWithLMHeadModel(XLMConfig(vocab_size=VOCABULARY, emb_dim=32, n_layers=1, n_heads=4)).double().eval()
    assert_own(xlm)
