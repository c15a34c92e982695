"""Multitask prompt tuning: one prompt times a low-rank matrix for each task."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from prompt_models import FAMILIES, attach, batch, both_ways, build, call
from safetensors.torch import load_file

from peftcore import get_peft_model
from peftcore.errors import CheckpointError, ConfigError
from peftcore.prompts.multitask_prompt_tuning import MultitaskPromptTuningConfig

OPTIONS: dict[str, Any] = {"num_virtual_tokens": 3, "num_tasks": 4, "num_ranks": 2}
TASKS = torch.tensor([3, 1])


@pytest.mark.filterwarnings("ignore")  # the oracle's own
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert-cls", "bert-tokens"])
def test_parity(family: str, tmp_path: Path) -> None:
    options = {**OPTIONS, "task_type": FAMILIES[family][1]}
    theirs, ours = peft.MultitaskPromptTuningConfig(**options), MultitaskPromptTuningConfig(**options)
    both_ways(family, theirs, ours, tmp_path, spread=1.0, task_ids=TASKS)


@pytest.mark.filterwarnings("ignore")  # the oracle's own
def test_parity_of_an_encoder_decoder(tmp_path: Path) -> None:
    """PEFT wants labels there and shifts them itself; half of the prompt stands before the decoder's text."""
    options = {**OPTIONS, "task_type": "SEQ_2_SEQ_LM"}
    theirs, ours = peft.MultitaskPromptTuningConfig(**options), MultitaskPromptTuningConfig(**options)
    both_ways(
        "t5",
        theirs,
        ours,
        tmp_path,
        spread=1.0,
        task_ids=TASKS,
        labels=batch(2, 4),
        decoder_input_ids=None,
        attention_mask=torch.ones(2, 6),
    )


def test_each_row_has_the_prompt_of_its_task() -> None:
    model = attach("llama", MultitaskPromptTuningConfig(**OPTIONS), spread=1.0).double()
    learner = model.prompt_encoder["default"]
    text = model.get_input_embeddings()(batch())
    rows = [
        torch.cat([learner.vectors * (learner.prefix_task_cols[t] @ learner.prefix_task_rows[t]), text[row]])
        for row, t in enumerate(TASKS.tolist())
    ]
    with model.disable_adapter(), torch.no_grad():
        expected = model(inputs_embeds=torch.stack(rows)).logits
    torch.testing.assert_close(call("llama", model, task_ids=TASKS), expected, rtol=0, atol=1e-10)


def test_generate_takes_the_tasks_also_with_beams() -> None:
    for family in ("llama", "t5"):
        model = attach(family, MultitaskPromptTuningConfig(**OPTIONS, task_type=FAMILIES[family][1]), spread=2.0)
        for options in ({}, {"num_beams": 3}):
            options = {"max_new_tokens": 5, "do_sample": False, **options}
            both = model.generate(batch(), task_ids=TASKS, **options)
            alone = [model.generate(batch()[i : i + 1], task_ids=TASKS[i : i + 1], **options) for i in range(2)]
            assert torch.equal(both, torch.cat(alone))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    attach("llama", MultitaskPromptTuningConfig(**OPTIONS)).save_pretrained(tmp_path)
    return tmp_path / "adapter_model.safetensors"


@pytest.mark.parametrize("start", ["AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"])
def test_starts_from_source_tasks(start: str, source: Path) -> None:
    config = MultitaskPromptTuningConfig(
        num_virtual_tokens=3,
        num_ranks=2,
        prompt_tuning_init=start,
        prompt_tuning_init_state_dict_path=str(source),
        **({"prompt_tuning_init_task": 2} if start == "EXACT_SOURCE_TASK" else {}),
    )
    learner = get_peft_model(build("llama"), config).prompt_encoder["default"]
    saved = load_file(source)
    torch.testing.assert_close(learner.vectors.data, saved["prompt_embeddings"], rtol=0, atol=0)
    for key in ("prefix_task_cols", "prefix_task_rows"):
        own, given = getattr(learner, key).data[0], saved[key]
        expected = {"AVERAGE_SOURCE_TASKS": given.mean(0), "EXACT_SOURCE_TASK": given[2]}.get(start)
        if expected is None:
            assert not any(torch.equal(own, task) for task in given)
        else:
            torch.testing.assert_close(own, expected, rtol=0, atol=0)


def test_sources_that_do_not_fit(source: Path, tmp_path: Path) -> None:
    def start(**options: Any) -> None:
        path = options.pop("path", source)
        options = {"num_virtual_tokens": 3, "num_ranks": 2, "prompt_tuning_init": "EXACT_SOURCE_TASK", **options}
        config = MultitaskPromptTuningConfig(**options, prompt_tuning_init_state_dict_path=str(path))
        get_peft_model(build("llama"), config)

    with pytest.raises(ConfigError, match="tasks 0 to 3"):
        start(prompt_tuning_init_task=4)
    with pytest.raises(ConfigError, match=r"use the source.s num_virtual_tokens and num_ranks"):
        start(num_virtual_tokens=5)
    with pytest.raises(ConfigError, match="pickle"):
        start(path=tmp_path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="cannot be read"):
        start(path=tmp_path / "nowhere.safetensors")


def test_task_ids_are_needed() -> None:
    model = attach("llama", MultitaskPromptTuningConfig(**OPTIONS))
    with pytest.raises(ConfigError, match="needs task_ids"):
        model(batch())
    with pytest.raises(ConfigError, match="has 3 entries for 2 rows"):
        model(batch(), task_ids=torch.zeros(3, dtype=torch.long))
    with pytest.raises(ConfigError, match="needs prompt_tuning_init_state_dict_path"):
        MultitaskPromptTuningConfig(num_virtual_tokens=2, prompt_tuning_init="EXACT_SOURCE_TASK")
