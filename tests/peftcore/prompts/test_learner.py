"""What all prompts share: generating with a cache, padding, answers, composition, switching, saving, training."""

import copy
import dataclasses
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from method_example import randomise
from prompt_models import FAMILIES, attach, batch, build, call
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, StaticCache, TrainingArguments

import peftcore
from peftcore import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peftcore.errors import AdapterNameError, ConfigError, MergeError
from peftcore.injection.inject import delete_adapter
from peftcore.prompts.adaption_prompt import AdaptionPromptConfig
from peftcore.prompts.cartridge import CartridgeConfig
from peftcore.prompts.cpt import CPTConfig
from peftcore.prompts.multitask_prompt_tuning import MultitaskPromptTuningConfig
from peftcore.prompts.p_tuning import PromptEncoderConfig
from peftcore.prompts.prefix_tuning import PrefixTuningConfig
from peftcore.prompts.prompt_tuning import PromptTuning, PromptTuningConfig
from peftcore.registry import methods
from peftcore.train import AdapterTrainer

N = 3
METHODS: dict[str, Any] = {
    "ADAPTION_PROMPT": lambda **o: AdaptionPromptConfig(adapter_len=N, adapter_layers=2, **o),
    "CARTRIDGE": lambda **o: CartridgeConfig(num_virtual_tokens=N, num_frozen_tokens=0, **o),
    "CPT": lambda **_: CPTConfig(
        cpt_token_ids=[5, 6, 7],
        cpt_tokens_type_mask=[1, 2, 4],
        opt_projection_epsilon=20.0,
        opt_projection_format_epsilon=20.0,
    ),
    "MULTITASK_PROMPT_TUNING": lambda **o: MultitaskPromptTuningConfig(num_virtual_tokens=N, num_tasks=3, **o),
    "PREFIX_TUNING": lambda **o: PrefixTuningConfig(num_virtual_tokens=N, prefix_projection=True, **o),
    "PROMPT_TUNING": lambda **o: PromptTuningConfig(num_virtual_tokens=N, **o),
    "P_TUNING": lambda **o: PromptEncoderConfig(num_virtual_tokens=N, **o),
}
FED = [method for method in METHODS if method not in ("ADAPTION_PROMPT", "CARTRIDGE", "PREFIX_TUNING")]
"""Those whose prompt is part of the sequence."""
DECODERS = ["gpt2", "llama", "mistral"]
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}


def test_every_registered_prompt_is_tested_here() -> None:
    prompts = {name for name, method in methods().items() if "model" in method.adapter.layer_kinds}
    assert prompts == set(METHODS) | {"LOREFT", "SHADOW"}, "they have no prompt: test_loreft.py, test_shadow.py"


def test_a_computed_prompt_needs_a_method_that_reads_it() -> None:
    with pytest.raises(TypeError, match=r"Doubled defines encoded, .*define has_encoder and drop_encoder as well"):

        class Doubled(PromptTuning):
            def encoded(self) -> Tensor:
                return 2 * self.vectors

    class Halved(PromptTuning):
        def encoded(self) -> Tensor:
            return 2 * self.vectors

        def load_checkpoint_tensors(self, tensors: Any) -> None:
            self.embedding.weight.data.copy_(tensors["prompt_embeddings"] / 2)

    assert Halved.encoded is not PromptTuning.encoded


def prompted(method: str, family: str, spread: float = 1.0) -> Any:
    return attach(family, METHODS[method](task_type=FAMILIES[family][1]), spread)


@pytest.mark.filterwarnings("ignore")  # transformers' own, of what HF PEFT calls
@pytest.mark.parametrize("method", [method for method in METHODS if method != "ADAPTION_PROMPT"])
def test_parameters_have_the_names_of_hf_peft(method: str) -> None:
    names = []
    for library in (peftcore, peft):
        config = dataclasses.replace(METHODS[method](), task_type="CAUSAL_LM")
        options = {o.name: getattr(config, o.name) for o in dataclasses.fields(config) if o.init}
        kind = getattr(library, type(config).__name__)
        known = {o.name for o in dataclasses.fields(kind)} - {"peft_type"}
        given = {name: value for name, value in options.items() if name in known and value is not None}
        model = library.get_peft_model(build("llama"), kind(**given))
        names.append({name for name, parameter in model.named_parameters() if parameter.requires_grad})
    assert names[0] == names[1]


def test_a_model_with_a_prompt_encoder_of_its_own_keeps_it() -> None:
    model: Any = build("llama")
    model.prompt_encoder = own = nn.Linear(2, 2)
    inject_adapter_in_model(METHODS["PROMPT_TUNING"](task_type="CAUSAL_LM"), model)
    assert model.prompt_encoder is own and hasattr(model, "peft_prompt_encoder")
    delete_adapter(model, "default")
    assert model.prompt_encoder is own and not hasattr(model, "peft_prompt_encoder")


@pytest.mark.parametrize("method", ["CPT", "P_TUNING", "PREFIX_TUNING"])
def test_the_encoder_that_an_earlier_release_saved_is_read(method: str, tmp_path: Path) -> None:
    model = prompted(method, "llama")
    model.save_pretrained(tmp_path)
    file = tmp_path / "prompt_encoder.safetensors"
    save_file({key.replace("embedding.weight", "embedding"): t for key, t in load_file(file).items()}, file)
    (tmp_path / "SHA256SUMS").unlink()
    again = PeftModel.from_pretrained(build("llama"), tmp_path, is_trainable=True)
    for name, tensor in model.prompt_encoder.state_dict().items():
        assert torch.equal(again.prompt_encoder.state_dict()[name], tensor)


def extra(method: str, rows: int = 2) -> dict[str, Any]:
    """Arguments of the method's own; row r has task r."""
    return {"task_ids": torch.arange(rows)} if method == "MULTITASK_PROMPT_TUNING" else {}


def padded(rows: list[Tensor], left: bool = True) -> dict[str, Tensor]:
    width = max(map(len, rows))
    pads = [(width - len(row), 0) if left else (0, width - len(row)) for row in rows]
    ids = torch.stack([F.pad(row, pad) for row, pad in zip(rows, pads, strict=True)])
    mask = torch.stack([F.pad(torch.ones_like(row), pad) for row, pad in zip(rows, pads, strict=True)])
    return {"input_ids": ids, "attention_mask": mask}


ROWS = {"one row": [batch(1)[0]], "left-padded": [batch(1, 7)[0], batch(1, 4)[0].flip(0)]}


def positions_of(mask: Tensor) -> Tensor:
    return mask.cumsum(1).sub(1).clamp(min=0)


@torch.no_grad()
def by_whole_forwards(model: Any, inputs: dict[str, Tensor], steps: int, **more: Any) -> Tensor:
    """Greedy text, each token from one forward over everything before it, without a cache."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for _ in range(steps):
        given = {"position_ids": positions_of(mask)} if mask.shape[1] % 2 else {}  # a prompt counts the same without
        if any(type(m).__name__ == "AdaptionPrompt" for m in model.prompt_encoder.children()):
            given = {"position_ids": positions_of(mask)}  # the base counts padding too
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **more, **given).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        mask = F.pad(mask, (0, 1), value=1)
    return ids


# -- generating ----------------------------------------------------------------------------------------------------

CACHES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "chunks": {"prefill_chunk_size": 4},
    "none": {"use_cache": False},
}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("method", METHODS)
def test_generate_with_any_cache_is_greedy_by_whole_forwards(method: str, family: str, rows: str) -> None:
    model, inputs, own = prompted(method, family), padded(ROWS[rows]), extra(method, len(ROWS[rows]))
    expected = by_whole_forwards(model, inputs, 6, **own)
    for cache, options in CACHES.items():
        assert torch.equal(model.generate(**inputs, **own, **GREEDY, **options), expected), cache
    logits = model(**inputs, **own).logits[:, -1]
    with model.disable_adapter(), torch.no_grad():
        assert not torch.allclose(model(**inputs).logits[:, -1], logits)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("method", [method for method in METHODS if method not in ("ADAPTION_PROMPT", "CPT")])
def test_generate_of_an_encoder_decoder(method: str, rows: str) -> None:
    model, inputs, own = prompted(method, "t5"), padded(ROWS[rows]), extra(method, len(ROWS[rows]))
    ids = torch.zeros(len(ROWS[rows]), 1, dtype=torch.long)
    with torch.no_grad():
        for _ in range(6):
            logits = model(**inputs, decoder_input_ids=ids, use_cache=False, **own).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    for cache in ("dynamic", "static", "none"):
        assert torch.equal(model.generate(**inputs, **own, **GREEDY, **CACHES[cache]), ids), cache


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("method", [method for method in METHODS if method not in ("ADAPTION_PROMPT", "CPT")])
def test_beams_are_the_same_with_and_without_a_cache(method: str, family: str) -> None:
    model, inputs, own = prompted(method, family), padded(ROWS["left-padded"]), extra(method)
    options = {**GREEDY, "num_beams": 3}
    expected = model.generate(**inputs, **own, **options, use_cache=False)
    assert torch.equal(model.generate(**inputs, **own, **options), expected)


@pytest.mark.parametrize("method", FED)
def test_generate_from_embeddings(method: str) -> None:
    model = prompted(method, "llama")
    embedded = model.get_input_embeddings()(batch())
    expected = model.generate(batch(), **extra(method), **GREEDY)[:, batch().shape[1] :]
    assert torch.equal(model.generate(inputs_embeds=embedded, **extra(method), **GREEDY), expected)


@pytest.mark.parametrize("method", ["PREFIX_TUNING", "PROMPT_TUNING"])
def test_a_caller_may_keep_the_cache_and_count_the_prompt_or_not(method: str) -> None:
    model = prompted(method, "llama")
    whole = call("llama", model)[:, -1]
    for counted in (0, N):
        first = model(batch()[:, :4], attention_mask=torch.ones(2, 4))
        assert first.cache.get_seq_length() == 4 + N
        for t in (4, 5):
            mask = torch.ones(2, counted + t + 1)
            last = model(batch()[:, t : t + 1], attention_mask=mask, cache=first.cache).logits[:, -1]
        torch.testing.assert_close(last, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["PREFIX_TUNING", "PROMPT_TUNING"])
def test_static_caches_of_the_caller(method: str) -> None:
    model = prompted(method, "llama")
    expected = call("llama", model)
    cache = StaticCache(config=model.config, max_cache_len=6)
    for _ in range(2):  # room is made while the cache has no memory, and stays
        torch.testing.assert_close(call("llama", model, cache=cache), expected, rtol=0, atol=1e-5)
        cache.reset()
    small = StaticCache(config=model.config, max_cache_len=6)
    with model.disable_adapter():
        call("llama", model, cache=small)
    small.reset()
    with pytest.raises(ConfigError, match="room for 6 tokens and this call needs 9, 3 of them for the prompt"):
        call("llama", model, cache=small)


def test_generate_does_not_go_on_from_a_prompted_cache() -> None:
    model = prompted("PROMPT_TUNING", "llama")
    out = model.generate(batch(), return_dict_in_generate=True, **GREEDY)
    with pytest.raises(ConfigError, match="the whole text and no cache"):
        model.generate(out.sequences, cache=out.cache, **GREEDY)
    model.generate(batch(), cache=DynamicCache(config=model.config), **GREEDY)


# -- padding and answers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("method", METHODS)
def test_a_padded_row_computes_what_it_computes_alone(method: str, family: str) -> None:
    model, text = prompted(method, family), batch(1, 4)
    own = extra(method, 1)
    alone = call(family, model, input_ids=text, **own)[0, -4:]
    for left in (True, False):
        inputs = padded([text[0], batch(1, 7)[0]], left)
        both = {key: value.repeat_interleave(2, 0) for key, value in own.items()}
        for given in ({}, {"position_ids": positions_of(inputs["attention_mask"])}):
            if method == "ADAPTION_PROMPT" and left and not given:
                continue  # it touches no positions: the base counts padding too
            logits = call(family, model, **inputs, **both, **given)[0]
            start = N if method in FED else 0
            row = logits[-4:] if left else logits[start : start + 4]
            torch.testing.assert_close(row, alone, rtol=0, atol=1e-5)


def test_a_first_chunk_of_padding_is_refused() -> None:
    inputs = padded(ROWS["left-padded"])
    with pytest.raises(ConfigError, match="make prefill_chunk_size larger"):
        prompted("PROMPT_TUNING", "llama").generate(**inputs, **GREEDY, prefill_chunk_size=2)
    model = prompted("PREFIX_TUNING", "llama")
    assert torch.equal(model.generate(**inputs, **GREEDY, prefill_chunk_size=2), by_whole_forwards(model, inputs, 6))


@pytest.mark.parametrize("family", DECODERS)
def test_an_empty_row_starts_from_its_prompt(family: str) -> None:
    model, width = prompted("PROMPT_TUNING", family), 4
    inputs = padded([batch(1, width)[0], batch(1, 0)[0]])
    both = model.generate(**inputs, **GREEDY)
    assert torch.equal(both[:1], model.generate(batch(1, width), **GREEDY))
    prompt = next(iter(model.prompt_encoder.children())).encoded()[None]
    with model.disable_adapter():
        alone = model.generate(inputs_embeds=prompt, **GREEDY)
    assert torch.equal(both[1, width], alone[0, 0])  # later ones differ: generate counts a position of the padding


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("method", ["PREFIX_TUNING", "PROMPT_TUNING"])
def test_a_decoder_classifies_by_the_last_token_of_the_text(method: str, left: bool) -> None:
    model, text = prompted(method, "llama-cls"), batch(1, 4)
    alone = call("llama-cls", model, input_ids=text)
    rows = call("llama-cls", model, **padded([text[0], batch(1, 7)[0]], left))
    torch.testing.assert_close(rows[:1], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_labels_are_those_of_the_text(method: str) -> None:
    if method == "CPT":
        pytest.skip("its loss is its own: test_cpt.py")
    model, rows = prompted(method, "llama"), [batch(1, 7)[0], batch(1, 4)[0]]
    first = 0 if method in FED else 1  # the last virtual token predicts the text's first
    for left in (True, False):
        inputs = padded(rows, left)
        supervised = positions_of(inputs["attention_mask"]).ge(first) & (inputs["attention_mask"] == 1)
        labels = inputs["input_ids"].masked_fill(~supervised, -100)
        out = model(**inputs, labels=labels, **extra(method))
        losses = []
        for row, text in enumerate(rows):
            own = {key: value[row : row + 1] for key, value in extra(method).items()}
            if method == "ADAPTION_PROMPT" and left:
                own["position_ids"] = torch.arange(7 - len(text), 7)[None]
            logits = model(text[None], **own).logits[0, -len(text) - 1 + first : -1]
            losses.append(F.cross_entropy(logits, text[first:], reduction="none"))
        torch.testing.assert_close(out.loss, torch.cat(losses).mean(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["PREFIX_TUNING", "PROMPT_TUNING"])
def test_answers_of_token_tasks_are_those_of_the_text(method: str) -> None:
    """PEFT compares them with the virtual tokens' logits, or fails."""
    start = N if method in FED else 0
    model = prompted(method, "bert-tokens")
    labels = batch() % 3
    out = model(batch(), labels=labels)
    expected = F.cross_entropy(out.logits[:, start:].flatten(0, 1), labels.flatten())
    torch.testing.assert_close(out.loss, expected, rtol=0, atol=1e-6)
    model = prompted(method, "bert-qa")
    first, last = torch.tensor([1, 2]), torch.tensor([3, 5])
    out = model(batch(), start_positions=first, end_positions=last)
    expected = F.cross_entropy(out.start_logits, first + start) + F.cross_entropy(out.end_logits, last + start)
    torch.testing.assert_close(out.loss, expected / 2, rtol=0, atol=1e-6)
    model = prompted(method, "bert-cls")
    loss = model(batch(), labels=torch.tensor([0, 2]), token_type_ids=torch.ones_like(batch())).loss
    assert loss.isfinite()


def test_token_types_stand_with_their_tokens() -> None:
    model, types = prompted("PROMPT_TUNING", "bert-features"), batch() % 2
    prompt = model.prompt_encoder["default"].vectors
    out = call("bert-features", model, token_type_ids=types)
    embedded = torch.cat([prompt.expand(2, N, 32), model.get_input_embeddings()(batch())], 1)
    with model.disable_adapter(), torch.no_grad():
        expected = model(inputs_embeds=embedded, token_type_ids=F.pad(types, (N, 0))).last_hidden_state
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["PREFIX_TUNING", "PROMPT_TUNING"])
def test_rows_with_no_place_for_a_prompt_are_refused(method: str) -> None:
    model = prompted(method, "llama")
    with pytest.raises(ConfigError, match="documents are packed"):
        model(batch(), position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))
    with pytest.raises(ConfigError, match="cannot be extended by a prompt"):
        model(batch(), attention_mask=torch.ones(2, 1, 6, 6))
    with pytest.raises(ConfigError, match="needs a text"):
        model(attention_mask=torch.ones(2, 6))


# -- beside other adapters -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_prompt_and_lora_are_a_prompt_on_the_merged_model(method: str) -> None:
    model = prompted(method, "llama")
    model.add_adapter("lora", LoraConfig(target_modules="all-linear", init_lora_weights=False))
    model.set_adapter(["lora", "default"])
    both = call("llama", model, **extra(method))
    assert all(not path.startswith("prompt_encoder") for path in model.peft_config["lora"].target_modules)
    prompt = copy.deepcopy(model.prompt_encoder["default"])
    base = model.merge_and_unload(adapter_names=["lora"])
    again = get_peft_model(base, METHODS[method](task_type="CAUSAL_LM"))
    again.prompt_encoder["default"].load_state_dict(prompt.state_dict())
    torch.testing.assert_close(call("llama", again, **extra(method)), both, rtol=0, atol=1e-5)


def test_one_prompt_at_a_time_stands_before_the_text() -> None:
    model = prompted("PROMPT_TUNING", "llama")
    one = call("llama", model)
    model.add_adapter("two", METHODS["PREFIX_TUNING"]())
    torch.testing.assert_close(call("llama", model), one, rtol=0, atol=0)
    with pytest.raises(AdapterNameError, match="only one prompt can be active"):
        model.set_adapter(["default", "two"])
    assert model.active_adapters == ["default"]
    model.set_adapter("two")
    assert call("llama", model).shape == (2, 6, 64)
    model.set_adapter([])
    torch.testing.assert_close(call("llama", model), call("llama", build("llama")), rtol=0, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_no_weight_can_hold_a_prompt(method: str) -> None:
    model = prompted(method, "llama")
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(MergeError, match="which cannot be merged into weights"):
            merge()
    assert isinstance(model, PeftModel)


@pytest.mark.parametrize("family", ["llama", "t5", "bert-cls"])
@pytest.mark.parametrize("method", ["PREFIX_TUNING", "P_TUNING"])
def test_taking_a_prompt_away_leaves_the_base(method: str, family: str) -> None:
    base = build(family)
    expected, names = call(family, base), list(base.state_dict())
    model = get_peft_model(base, METHODS[method](task_type=FAMILIES[family][1])).eval()
    randomise(model, 1.0)
    with model.disable_adapter():
        torch.testing.assert_close(call(family, model), expected, rtol=0, atol=0)
    model.add_adapter("two", METHODS[method](task_type=FAMILIES[family][1]))
    model.set_adapter("two")
    model.delete_adapter("default")
    assert call(family, model).shape[:1] == expected.shape[:1]
    model.delete_adapter("two")
    torch.testing.assert_close(call(family, model), expected, rtol=0, atol=0)
    plain = model.unload()
    assert list(plain.state_dict()) == names
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in plain.modules())


def test_prompts_are_parameters_of_the_model() -> None:
    model = get_peft_model(build("llama"), METHODS["P_TUNING"](task_type="CAUSAL_LM"))
    learner = model.prompt_encoder["default"]
    assert {id(p) for p in learner.parameters()} == {id(p) for p in model.parameters() if p.requires_grad}
    assert model.get_nb_trainable_parameters()[0] == sum(p.numel() for p in learner.parameters())
    assert not model.eval().prompt_encoder["default"].training
    assert model.double().prompt_encoder["default"].vectors.dtype == torch.float64
    model.set_requires_grad("default", False)
    assert not any(p.requires_grad for p in model.parameters())


def test_a_model_that_keeps_its_class() -> None:
    """`inject_adapter_in_model` changes no class; a forward needs none of it."""
    model = inject_adapter_in_model(METHODS["PROMPT_TUNING"](), build("llama"))
    assert call("llama", model).shape == (2, 9, 64)
    ids = padded([batch(1)[0]])
    assert torch.equal(model.generate(**ids, **GREEDY), by_whole_forwards(model, ids, 6))


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("method", ["PREFIX_TUNING", "P_TUNING"])
def test_copies_and_pickles(method: str, family: str) -> None:
    model = prompted(method, family)
    before = call(family, model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(call(family, copied), before, rtol=0, atol=0)
        copied.prompt_encoder["default"].vectors.data.add_(1)
        assert (call(family, copied) - before).abs().max() > 1e-3
        torch.testing.assert_close(call(family, model), before, rtol=0, atol=0)


# -- training ------------------------------------------------------------------------------------------------------


def steps(model: Any, method: str, first: int, last: int) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    for step in range(first, last):
        tokens = torch.randint(1, 60, (2, 6), generator=torch.Generator().manual_seed(step))
        model.train()(tokens, labels=tokens, **extra(method)).loss.backward()
        with torch.no_grad():
            for parameter in parameters:
                parameter.sub_(0.1 * parameter.grad)
                parameter.grad = None


@pytest.mark.parametrize("method", METHODS)
def test_training_goes_on_from_disk_bit_for_bit(method: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = get_peft_model(build("llama"), METHODS[method](task_type="CAUSAL_LM"))
    start = {key: value.clone() for key, value in model.prompt_encoder["default"].state_dict().items()}
    steps(model, method, 0, 2)
    model.save_pretrained(tmp_path)
    steps(model, method, 2, 4)
    again = PeftModel.from_pretrained(build("llama"), tmp_path, is_trainable=True)
    steps(again, method, 2, 4)
    ours, theirs = (m.prompt_encoder["default"].state_dict() for m in (again, model))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert any(not torch.equal(start[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("method", ["CPT", "P_TUNING", "PREFIX_TUNING", "PROMPT_TUNING"])
def test_the_trainer_computes_the_models_loss_and_resumes(method: str, tmp_path: Path) -> None:
    rows = [{"input_ids": row, "labels": row} for row in batch(8, 6)]

    def trainer(folder: str) -> AdapterTrainer:
        torch.manual_seed(4)
        model = get_peft_model(build("llama"), METHODS[method](task_type="CAUSAL_LM"))
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
        return AdapterTrainer(model=model, args=args, train_dataset=rows)  # type: ignore[arg-type]

    whole, resumed = trainer("whole"), trainer("resumed")
    given = {"input_ids": batch(4), "labels": batch(4)}
    ours = whole.compute_loss(whole.model, dict(given))
    torch.testing.assert_close(ours, whole.model(**given).loss, rtol=0, atol=1e-6)
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    first, second = (t.model.prompt_encoder["default"].state_dict() for t in (whole, resumed))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.filterwarnings("ignore")  # the oracle's own
@pytest.mark.parametrize(
    ("method", "family"),
    [*((method, "llama") for method in (*FED, "PREFIX_TUNING")), ("PROMPT_TUNING", "t5"), ("PREFIX_TUNING", "t5")],
)
def test_get_prompt_returns_what_hf_peft_returns(method: str, family: str, tmp_path: Path) -> None:
    model = prompted(method, family).eval()
    model.peft_config["default"].task_type = FAMILIES[family][1]  # PEFT's CPT needs it
    model.save_pretrained(tmp_path)
    other = peft.PeftModel.from_pretrained(build(family), str(tmp_path)).eval()
    with torch.no_grad():
        ours, theirs = model.get_prompt(2, **extra(method)), other.get_prompt(2, **extra(method))
    if method == "PREFIX_TUNING":
        ours, theirs = (getattr(cache, "self_attention_cache", cache) for cache in (ours, theirs))
        pairs = zip(ours.layers, theirs.layers, strict=True)
        values = [(own.keys, other.keys) for own, other in pairs]
        values += [(own.values, other.values) for own, other in zip(ours.layers, theirs.layers, strict=True)]
    else:
        values = [(ours, theirs)]
    for own, expected in values:
        torch.testing.assert_close(own, expected.reshape(own.shape), rtol=1e-5, atol=1e-6)


def test_get_prompt_needs_a_prompt_and_its_own_arguments() -> None:
    with pytest.raises(ConfigError, match="PromptTuning takes no task_ids; leave it out"):
        prompted("PROMPT_TUNING", "llama").get_prompt(2, task_ids=torch.arange(2))
    with pytest.raises(ConfigError, match="needs task_ids"):
        prompted("MULTITASK_PROMPT_TUNING", "llama").get_prompt(2)
    with pytest.raises(ConfigError, match="max_cache_len must be None"):
        prompted("PREFIX_TUNING", "llama").get_prompt(2, max_cache_len=5)
    with pytest.raises(ConfigError, match="AdaptionPrompt adds nothing to the model's inputs"):
        prompted("ADAPTION_PROMPT", "llama").get_prompt(2)
    with pytest.raises(ConfigError, match="'default' is LORA, which adds no prompt"):
        get_peft_model(build("llama"), LoraConfig()).get_prompt(2)
