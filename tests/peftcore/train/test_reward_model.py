"""Reward models that score answers: the rewards of training, batches, chats, and adapters that are no reward models."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pairs import adapted as causal
from tiny_rewards import adapted, decoder
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from peftcore import ConfigError, LoraConfig, TrainingError, get_peft_model
from peftcore.train import RewardModel, best_of_n, check_reward_adapter

TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}{% if add_generation_prompt %}a {% endif %}"


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<eos>": 1, **{letter: number for number, letter in enumerate("abcdefgh", 2)}, "user": 10}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    options: dict[str, Any] = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATE, **options)


@pytest.fixture
def folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder with a base, its tokenizer, and an adapter of a reward model."""
    decoder().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    adapted().save_pretrained(tmp_path / "adapter")
    return tmp_path


def test_a_reward_is_that_of_prompt_answer_and_end(folder: Path) -> None:
    reward = RewardModel.from_pretrained(folder / "adapter", folder / "base")
    ids = torch.tensor([[2, 3, 4, 5, 1]])
    with torch.no_grad():
        expected = adapted().eval()(input_ids=ids).logits.item()
    assert reward("a b ", "c d") == pytest.approx(expected, abs=1e-6)
    assert reward("a b ", "c d", {"any": "row"}) == reward("a b ", "c d")
    assert reward([{"role": "user", "content": "b"}], "c") == reward("user b a ", "c")
    assert reward("a b ", "c d") != reward("a b ", "d c")


def test_batches_change_no_reward(folder: Path) -> None:
    prompts, answers = ["a b ", "a ", "c b a "] * 3, ["c", "d e f g", "h"] * 3
    reward = RewardModel.from_pretrained(folder / "adapter", folder / "base", batch_size=2)
    together = reward.rewards(prompts, answers)
    assert together == pytest.approx([reward(p, a) for p, a in zip(prompts, answers, strict=True)], abs=1e-5)
    results = best_of_n(["a b "], lambda asked: ["c", "d", "e", "f"][: len(asked)], reward, 4)
    assert results[0].rewards == pytest.approx([reward("a b ", answer) for answer in "cdef"], abs=1e-5)


def test_an_adapter_with_another_head_is_refused(folder: Path) -> None:
    adapted(lambda: decoder(3)).save_pretrained(folder / "classifier")
    with pytest.raises(ConfigError, match=r"classifier of 3 classes \(.*score.weight\), and a reward model has one"):
        RewardModel.from_pretrained(folder / "classifier", folder / "base")
    causal().save_pretrained(folder / "causal")
    with pytest.raises(ConfigError, match=r"adapter for no task, and a reward model is one for SEQ_CLS"):
        check_reward_adapter(folder / "causal")
    get_peft_model(decoder(), LoraConfig(r=2, target_modules="all-linear")).save_pretrained(folder / "headless")
    config = folder / "headless" / "adapter_config.json"
    config.chmod(0o644)
    config.write_text(config.read_text().replace('"task_type": null', '"task_type": "SEQ_CLS"'))
    with pytest.raises(ConfigError, match="has no head"):
        check_reward_adapter(folder / "headless")


def test_a_model_of_several_classes_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match="has 3 outputs, so it is a classifier; a reward model has num_labels=1"):
        RewardModel(decoder(3), tokenizer)


def test_a_reward_that_is_not_finite_is_an_error(folder: Path) -> None:
    reward = RewardModel.from_pretrained(folder / "adapter", folder / "base")
    with torch.no_grad():
        reward.model.score.current().weight.fill_(torch.nan)  # pyright: ignore
    with pytest.raises(TrainingError, match=r"the reward of the answer 'c' is nan: .*load it in float32"):
        reward("a b ", "c")
