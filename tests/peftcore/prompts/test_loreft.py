"""LoReFT: a low-rank change of the block's output at the first and last tokens of each prompt."""

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from method_example import randomise
from prompt_models import batch, build, call
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, TrainingArguments

from peftcore import (
    ConfigError,
    LoraConfig,
    LoReftConfig,
    MergeError,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
)
from peftcore.composition import Stack
from peftcore.errors import RoutingError, TargetError
from peftcore.train import AdapterTrainer

GREEDY: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}


def reft(family: str = "llama", spread: float = 0.3, **options: Any) -> Any:
    torch.manual_seed(3)
    model = get_peft_model(build(family).double(), LoReftConfig(**{"r": 3, "positions": "f2+l1", **options}))
    randomise(model, spread)
    return model.eval()


def learner_of(model: Any, name: str = "default") -> Any:
    return model.prompt_encoder[name]


def padded(rows: list[Tensor], left: bool) -> dict[str, Tensor]:
    width = max(map(len, rows))
    pads = [(width - len(row), 0) if left else (0, width - len(row)) for row in rows]
    ids = torch.stack([F.pad(row, pad) for row, pad in zip(rows, pads, strict=True)])
    mask = torch.stack([F.pad(torch.ones_like(row), pad) for row, pad in zip(rows, pads, strict=True)])
    return {"input_ids": ids, "attention_mask": mask, "position_ids": mask.cumsum(1).sub(1).clamp(min=0)}


# -- mathematics -----------------------------------------------------------------------------------------------------


def expected_tokens(h: Tensor, part: Any, orthogonality: bool, subtract_projection: bool, act: Any) -> Tensor:
    """Apply the paper's equation to each token by itself, with R from a QR factorisation."""
    r = part.loreft_A.detach()
    if orthogonality:
        q, upper = torch.linalg.qr(r.T)
        r = (q * upper.diagonal().sign()).T
    w, b = part.loreft_W.detach(), part.loreft_b.detach()
    changed = []
    for token in h:
        source = act(w @ token + b)
        changed.append(token + r.T @ (source - r @ token if subtract_projection else source))
    return torch.stack(changed)


FORMS = [
    {},
    {"orthogonality": False},
    {"orthogonality": False, "subtract_projection": False},
    {"subtract_projection": False, "act_fn": "relu"},
]


@pytest.mark.parametrize(
    "family, options",
    [*(("llama", form) for form in FORMS), ("gpt2", FORMS[0]), ("bert-features", FORMS[0])],
    ids=["LoReFT", "NoReFT", "DiReFT", "orthogonal DiReFT", "LoReFT-gpt2", "LoReFT-bert"],
)
def test_the_papers_equation_at_first_and_last_tokens(family: str, options: dict[str, Any]) -> None:
    model = reft(family, **options)
    seen: list[Any] = []
    for path in learner_of(model).paths:
        block = model.get_submodule(path)
        block.register_forward_hook(lambda _m, _a, out: seen.append(out[0] if isinstance(out, tuple) else out))
        block.register_forward_hook(
            lambda _m, _a, out: seen.append(out[0] if isinstance(out, tuple) else out), prepend=True
        )
    with torch.no_grad():
        model(batch())
    before, after = seen[::2], seen[1::2]
    form = {"orthogonality": True, "subtract_projection": True, **options}
    act = {"relu": torch.relu}.get(form.pop("act_fn", ""), lambda x: x)
    assert len(before) == 2
    for h, changed, block in zip(before, after, learner_of(model).blocks, strict=True):
        for row, found in zip(h, changed, strict=True):
            torch.testing.assert_close(found[:2], expected_tokens(row[:2], block["first"], **form, act=act))
            torch.testing.assert_close(found[-1:], expected_tokens(row[-1:], block["last"], **form, act=act))
            assert torch.equal(found[2:-1], row[2:-1])


def test_the_projection_starts_and_stays_orthonormal() -> None:
    model = get_peft_model(build("llama"), LoReftConfig(r=4))
    part = learner_of(model).blocks[0]["first"]
    torch.testing.assert_close(part.projection(), part.loreft_A)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(8):
        labels = batch().clone()
        labels[:, :4] = -100
        loss = model(batch(), labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert (part.loreft_A @ part.loreft_A.T - torch.eye(4)).abs().max() > 0.05, "the parameter itself is free"
    torch.testing.assert_close(part.projection() @ part.projection().T, torch.eye(4), rtol=0, atol=1e-6)


def test_the_change_sets_the_projection_and_leaves_its_complement() -> None:
    part = learner_of(reft())
    part, h = part.blocks[0]["first"], torch.randn(2, 5, 32, dtype=torch.float64)
    r, changed = part.projection(), part(h)
    torch.testing.assert_close(changed @ r.T, F.linear(h, part.loreft_W, part.loreft_b))
    complement = torch.eye(32, dtype=torch.float64) - r.T @ r
    torch.testing.assert_close(changed @ complement, h @ complement)


def test_tied_weights_are_one_intervention_for_first_and_last_tokens() -> None:
    tied, untied = reft(tied_weights=True), reft()
    assert list(learner_of(tied).blocks[0]) == ["both"]
    assert tied.get_nb_trainable_parameters()[0] * 2 == untied.get_nb_trainable_parameters()[0] == 2 * 2 * (2 * 96 + 3)
    for block, other in zip(learner_of(untied).blocks, learner_of(tied).blocks, strict=True):
        for part in block.values():
            part.load_state_dict(other["both"].state_dict())
    torch.testing.assert_close(call("llama", untied), call("llama", tied))


# -- positions -------------------------------------------------------------------------------------------------------

TEXTS = [batch(1, 9)[0], batch(1, 5)[0].flip(0), batch(1, 2)[0], batch(1, 1)[0]]


@pytest.mark.parametrize("positions", ["f2+l2", "l4"])
@pytest.mark.parametrize("left", [True, False])
def test_a_padded_row_computes_what_it_computes_alone(left: bool, positions: str) -> None:
    model = reft(positions=positions)
    inputs = padded(TEXTS, left)
    together = call("llama", model, **inputs)
    for row, text in enumerate(TEXTS):
        alone = call("llama", model, input_ids=text[None])[0]
        seen = inputs["attention_mask"][row].bool()
        torch.testing.assert_close(together[row][seen], alone, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "positions, length, changed",
    [
        ("f2+l1", 6, {0, 1, 5}),
        ("f7+l7", 6, {0, 1, 2, 3, 4, 5}),
        ("f7+l7", 5, {0, 1, 3, 4}),  # as in pyreft, at most half of the prompt each
        ("l1", 6, {5}),
        ("f1", 6, {0}),
        ("f3", 4, {0, 1}),
        ("f1+l1", 1, set()),
    ],
)
def test_which_tokens_change(positions: str, length: int, changed: set[int]) -> None:
    model = reft(positions=positions, layers_to_transform=1, spread=1.0)
    with torch.no_grad():
        found = model.base_model.model(batch(1, length), output_hidden_states=True).hidden_states[-1]
        with model.disable_adapter():
            base = model(batch(1, length), output_hidden_states=True).hidden_states[-1]
    assert set((found - base)[0].abs().amax(-1).gt(1e-6).nonzero().flatten().tolist()) == changed


def test_labels_and_lengths_say_where_the_prompt_ends() -> None:
    model = reft()
    whole = call("llama", model)
    labels = batch().clone()
    labels[0, :4], labels[1, :3] = -100, -100
    with torch.no_grad():
        labelled = model(batch(), labels=labels).logits
        given = model(batch(), prompt_lengths=torch.tensor([4, 3])).logits
        cut = model(batch()[:1, :4]).logits
    torch.testing.assert_close(labelled, given)
    torch.testing.assert_close(labelled[:1, :4], cut)
    assert not torch.allclose(labelled, whole)
    torch.testing.assert_close(call("llama", model, labels=batch()), whole)  # nothing before the first label
    torch.testing.assert_close(call("llama", model, prompt_lengths=[6, 6]), whole)
    with pytest.raises(ConfigError, match="prompt_lengths must have an entry for each of the 2 rows; got \\[3\\]"):
        model(batch(), prompt_lengths=[1, 2, 3])


def test_labels_of_a_classifier_say_nothing_about_the_prompt() -> None:
    model = reft("bert-tokens")
    labels = batch() % 3
    labels[:, :2] = -100
    torch.testing.assert_close(call("bert-tokens", model, labels=labels), call("bert-tokens", model))
    model = reft("llama-cls")
    model.train()
    torch.testing.assert_close(call("llama-cls", model, labels=torch.tensor([0, 1])), call("llama-cls", model))


def test_training_without_labels_is_a_warning() -> None:
    model = reft()
    model.train()
    with pytest.warns(UserWarning, match="takes the whole row as prompt.*give labels, or prompt_lengths"):
        model(batch())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(batch(), prompt_lengths=[3, 3])
        model.generate(batch(), **GREEDY)


# -- generating ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def by_whole_forwards(model: Any, text: Tensor, steps: int = 5) -> Tensor:
    """Greedy text of one row, each token from one forward over everything before it."""
    ids, length = text[None], torch.tensor([len(text)])
    for _ in range(steps):
        logits = model(input_ids=ids, prompt_lengths=length, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    return ids[0, len(text) :]


CACHES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "chunks": {"prefill_chunk_size": 4},
    "none": {"use_cache": False},
}


SLOW = pytest.mark.slow


@pytest.mark.parametrize("cache", ["none", *(pytest.param(c, marks=SLOW) for c in ("dynamic", "static", "chunks"))])
def test_generate_changes_tokens_of_the_prompt_only(cache: str) -> None:
    model, texts = reft(spread=0.6), TEXTS[:3]
    inputs = padded(texts, left=True)
    del inputs["position_ids"]
    found = model.generate(**inputs, **GREEDY, **CACHES[cache])[:, 9:]
    expected = torch.stack([by_whole_forwards(model, text) for text in texts])
    assert torch.equal(found, expected)
    with model.disable_adapter():
        assert not torch.equal(model.generate(**inputs, **GREEDY)[:, 9:], expected)


@pytest.mark.slow
def test_generate_with_a_positional_text_beams_and_lengths() -> None:
    model = reft(spread=0.6)
    expected = model.generate(input_ids=batch(), **GREEDY)
    assert torch.equal(model.generate(batch(), **GREEDY, use_cache=False), expected)
    assert torch.equal(model.generate(batch(), **GREEDY, prompt_lengths=torch.tensor([6, 6])), expected)
    embedded = model.get_input_embeddings()(batch())
    assert torch.equal(model.generate(inputs_embeds=embedded, **GREEDY, use_cache=False), expected[:, 6:])
    beams = model.generate(batch(), **GREEDY, num_beams=3, use_cache=False)
    assert torch.equal(model.generate(batch(), **GREEDY, num_beams=3), beams)
    shorter = model.generate(batch(), **GREEDY, num_beams=2, prompt_lengths=torch.tensor([4, 4]))
    assert torch.equal(model.generate(batch(), **GREEDY, num_beams=2, prompt_lengths=[4, 4], use_cache=False), shorter)
    with pytest.raises(ValueError, match="nonsense"):
        model.generate(batch(), **GREEDY, nonsense=1)
    assert learner_of(model)._generated is None


def test_a_filled_cache_goes_on_without_change() -> None:
    model = reft()
    expected = call("llama", model, prompt_lengths=[4, 4])
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        first = model(batch()[:, :4], cache=cache).logits
        later = model(batch()[:, 4:], cache=cache).logits
    torch.testing.assert_close(torch.cat([first, later], 1), expected)


# -- beside other adapters -------------------------------------------------------------------------------------------


def several() -> Any:
    model = reft()
    model.add_adapter("other", LoReftConfig(r=2, positions="l2", layers_to_transform=[0]))
    model.add_adapter("lora", LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    model.set_requires_grad("other", True)
    randomise(model, 0.3, seed=5)
    return model.double().eval()


@pytest.mark.parametrize("left", [True, pytest.param(False, marks=SLOW)])
def test_a_row_of_a_mixed_batch_is_what_it_is_alone(left: bool) -> None:
    model, names = several(), ["default", None, "lora", Stack("lora", "default"), "other", {"default": 0.5}]
    texts = [*TEXTS, TEXTS[0].flip(0), TEXTS[1].flip(0)]
    inputs = padded(texts, left)
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            mixed = model(**inputs, adapter_names=names).logits
            for row, name in enumerate(names):
                with model.route(name):
                    alone = model(texts[row][None]).logits[0]
                seen = inputs["attention_mask"][row].bool()
                torch.testing.assert_close(mixed[row][seen], alone, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "options", [{}, pytest.param({"num_beams": 2}, marks=SLOW), pytest.param({"use_cache": False}, marks=SLOW)]
)
def test_generating_in_a_mixed_batch(options: dict[str, Any]) -> None:
    model, names = several(), ["default", "lora", None, "other"]
    ids = batch(4)
    mixed = model.generate(ids, adapter_names=names, **GREEDY, **options)
    for row, name in enumerate(names):
        with model.route(name):
            assert torch.equal(mixed[row], model.generate(ids[row : row + 1], **GREEDY, **options)[0]), name


def test_two_act_one_after_another_in_the_order_in_which_they_were_added() -> None:
    model = several()
    model.set_adapter(["default", "other"])
    both = call("llama", model)
    for name in ("default", "other"):
        model.set_adapter(name)
        assert not torch.allclose(call("llama", model), both)
    model.set_adapter(["other", "default"])
    assert torch.equal(call("llama", model), both)


def test_a_text_with_virtual_tokens_is_refused() -> None:
    model = reft()
    model.add_adapter("prompt", PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    model.set_adapter(["default", "prompt"])
    with pytest.raises(RoutingError, match="LoReft acts at positions of the text, which PromptTuning shifts"):
        model(batch())
    with pytest.raises(RoutingError, match="acts at positions of the text"):
        model(batch(), adapter_names=["default", "prompt"])
    model.set_adapter("default")
    assert call("llama", model).isfinite().all()


def test_no_weight_can_hold_it() -> None:
    for merge in ("merge_adapter", "merge_and_unload"):
        with pytest.raises(MergeError, match="cannot be merged into weights"):
            getattr(reft(), merge)()


# -- training, copies, disk ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [pytest.param(True, marks=SLOW), False])
def test_activation_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    labels = batch().clone()
    labels[0, :4], labels[1, :3] = -100, -100
    found = []
    for recomputes in (False, True):
        model = several()
        model.set_adapter(["default", "lora"])
        model.train()
        if recomputes:
            model.enable_input_require_grads()
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        first = model(batch(), labels=labels, use_cache=False).loss
        second = model(batch().flip(1), prompt_lengths=[2, 5], use_cache=False).logits.square().mean()
        (first + second).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and any("loreft_A" in name for name in found[0])
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


@pytest.mark.slow
def test_the_trainer_gives_the_labels_to_the_model_and_resumes(tmp_path: Path) -> None:
    labels = batch(8)
    labels[:, :3] = -100
    rows = [{"input_ids": ids, "labels": label} for ids, label in zip(batch(8), labels, strict=True)]

    def trainer(folder: str) -> Any:
        torch.manual_seed(4)
        args = TrainingArguments(
            output_dir=str(tmp_path / folder),
            max_steps=4,
            per_device_train_batch_size=4,
            learning_rate=0.1,
            lr_scheduler_type="constant",
            save_strategy="epoch",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        model = get_peft_model(build("llama"), LoReftConfig(r=3, positions="f2+l1"))
        return AdapterTrainer(model=model, args=args, train_dataset=rows, eval_dataset=rows)  # type: ignore[arg-type]

    whole, resumed = trainer("whole"), trainer("resumed")
    given = {"input_ids": batch(4), "labels": labels[:4]}
    logits = whole.model(batch(4), prompt_lengths=[3] * 4).logits
    expected = F.cross_entropy(logits[:, 2:-1].flatten(0, 1), labels[:4, 3:].flatten())
    torch.testing.assert_close(whole.compute_loss(whole.model, dict(given)), expected)
    whole.train()
    with torch.no_grad():
        logits = whole.model.eval()(batch(8), prompt_lengths=[3] * 8).logits
    expected = F.cross_entropy(logits[:, 2:-1].flatten(0, 1), labels[:, 3:].flatten())
    assert whole.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    first, second = (learner_of(each.model).state_dict() for each in (whole, resumed))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # dynamo's own
def test_it_compiles() -> None:
    torch._dynamo.reset()
    model = reft()
    lengths = torch.tensor([4, 3])
    with torch.no_grad():
        expected = model(batch(), prompt_lengths=lengths, use_cache=False).logits
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(batch(), prompt_lengths=lengths, use_cache=False).logits, expected)


def test_gradients_reach_all_parameters_of_the_adapter_only() -> None:
    model = reft()
    model(batch()).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("loreft_" in name), name


@pytest.mark.parametrize("options", [{}, pytest.param({"tied_weights": True, "positions": "f2+l2"}, marks=SLOW)])
def test_save_and_load(options: dict[str, Any], tmp_path: Path) -> None:
    model = reft(**options)
    expected = call("llama", model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build("llama").double(), tmp_path)
    assert torch.equal(call("llama", again), expected)
    assert not any(parameter.requires_grad for parameter in again.parameters())
    keys = set(load_file(tmp_path / "adapter_model.safetensors"))
    names = ["both"] if "tied_weights" in options else ["first", "last"]
    assert keys == {
        f"base_model.model.model.layers.{number}.{name}.loreft_{letter}"
        for number in (0, 1)
        for name in names
        for letter in "AWb"
    }


def test_copies_pickles_and_taking_it_away() -> None:
    model = reft()
    expected = call("llama", model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(call("llama", twin), expected)
    model.delete_adapter("default")
    assert torch.equal(call("llama", model), call("llama", build("llama").double()))
    assert all(not m._forward_hooks for m in model.unload().model.layers)


def test_a_base_in_16_bits_keeps_its_type_and_the_adapter_is_float32() -> None:
    model = get_peft_model(build("llama").bfloat16(), LoReftConfig(r=2)).eval()
    assert {p.dtype for p in learner_of(model).parameters()} == {torch.float32}
    assert call("llama", model).dtype == torch.bfloat16


def test_dropout_acts_in_training_only() -> None:
    model = reft("llama-cls", dropout=0.5)
    assert torch.equal(call("llama-cls", model), call("llama-cls", model))
    model.train()
    assert not torch.equal(call("llama-cls", model), call("llama-cls", model))


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"r": 0}, "r must be a positive integer; got 0"),
        ({"r": 33}, "r must be at most the width 32 of the blocks; got 33"),
        ({"act_fn": "rellu"}, "unknown act_fn 'rellu'.*relu"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1; got 1.0"),
        *(
            ({"positions": text}, "positions must name first and last tokens of the prompt; got .*'f7.l7'")
            for text in ("", "f0", "all", "f2l2", "f2+", "+l2", "l2+f2", "f-1")
        ),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        get_peft_model(build("llama"), LoReftConfig(**options))


def test_an_option_without_effect_is_a_warning() -> None:
    with pytest.warns(UserWarning, match="tied_weights has no effect without positions with first and last tokens"):
        get_peft_model(build("llama"), LoReftConfig(positions="f2", tied_weights=True))


def test_models_and_calls_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="has an encoder and a decoder; take another method"):
        get_peft_model(build("t5"), LoReftConfig())
    with pytest.raises(TargetError, match="Sequential has no list of blocks"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoReftConfig())
    model = reft()
    with pytest.raises(ConfigError, match="needs a call of the whole model"):
        model.model(batch())
    with pytest.raises(ConfigError, match="documents are packed"):
        model(batch(), position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))
    with pytest.raises(ConfigError, match="give a padding mask"):
        model(batch(), attention_mask=torch.ones(2, 1, 6, 6))
    with pytest.raises(ConfigError, match="which has 3 of 6 tokens; give the mask of the whole prompt"):
        model(batch(), attention_mask=torch.ones(2, 3))
