"""Chats with reasoning, a template of their own and added tokens through the stages, from the fetch to the merge."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from flows.errors import DataError, StageError
from flows.params import Params
from flows.paths import Paths
from flows.registry.adapter_files import foreign_files
from flows.stages import evaluate, fetch, merge, prepare, train
from peftcore import AutoPeftModelForCausalLM, PeftConfig
from peftcore.files import damaged_files, write_manifest

TEMPLATE = (
    "{% for m in messages %}{{ '<|turn|>' + m['role'] + '\n' }}"
    "{% if m.thinking is defined %}{{ '<think>' + m.thinking + '</think>' }}{% endif %}{{ m['content'] + '<|stop|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|turn|>assistant\n' }}{% endif %}"
)
TOKENS = ["<|turn|>", "<|stop|>", "<|sum|>"]


IA3 = {"name": "ia3", "r": None, "lora_alpha": None, "lora_dropout": 0.0}


def chat(number: int) -> dict[str, Any]:
    answer = {"role": "assistant", "reasoning_content": f"{number} and 1.", "content": f"<|sum|>{number + 1}", "id": 7}
    return {"messages": [{"role": "user", "content": f"Add 1 to {number}."}, answer], "book": f"book{number // 4}"}


@pytest.fixture
def made(tmp_path: Path, tiny_base: Path, tiny_params: Callable[..., Params]) -> tuple[Callable[..., Params], Paths]:
    """`made[0](data={...})`: parameters with the rows, the base and the template of this file."""
    tiny_base.rename(tmp_path / "source")
    (tmp_path / "data").mkdir()
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(chat(n)) + "\n" for n in range(100)))
    (tmp_path / "data" / "chat.jinja").write_text(TEMPLATE)

    def make(**sections: dict[str, Any]) -> Params:
        data = {"chat_template": "data/chat.jinja", "special_tokens": TOKENS, "ignored_fields": ["id"]}
        return tiny_params(base={"source": "path:source"}, **sections | {"data": data | sections.get("data", {})})

    return make, Paths(tmp_path)


@pytest.mark.slow
def test_reasoning_and_added_tokens_are_trained_and_saved(made: tuple[Callable[..., Params], Paths]) -> None:
    make, paths = made
    params = make(data={"near_duplicates": "keep"}, merge={"max_kl": 10.0, "min_top1_agreement": 0.0})
    fetch.run(params, paths)
    prepare.run(params, paths)
    rows = parquet.read_table(paths.split("train")).to_pylist()
    tokenizer = AutoTokenizer.from_pretrained(paths.base)
    ids = tokenizer.convert_tokens_to_ids(TOKENS)
    for row in rows:
        learned = tokenizer.decode([label for label in row["labels"] if label >= 0])
        assert learned == row["completion"] + "<|stop|>"
        assert row["completion"].startswith("<think>") and "</think><|sum|>" in row["completion"]
        assert set(ids) <= set(row["input_ids"])
    train.run(params, paths)
    config = PeftConfig.from_pretrained(paths.adapter)
    assert config.trainable_token_indices == {"embed_tokens": ids, "lm_head": ids}
    weights = load_file(paths.adapter / "adapter_model.safetensors")
    trained = {name: rows for name, rows in weights.items() if "trainable_tokens" in name}
    assert len(trained) == 2
    base: Any = AutoModelForCausalLM.from_pretrained(paths.base, dtype=torch.float32)
    ends = {"embed_tokens": base.get_input_embeddings().weight, "lm_head": base.get_output_embeddings().weight}
    for name, values in trained.items():
        start = next(weight for end, weight in ends.items() if end in name)[ids]
        assert not torch.equal(values.float(), start), name
    assert AutoTokenizer.from_pretrained(paths.adapter).chat_template == TEMPLATE
    assert foreign_files(paths.adapter) == [] == damaged_files(paths.adapter)
    evaluate.run(params, paths)
    metrics = json.loads(paths.evaluation_metrics.read_text())
    assert metrics["adapter"]["loss"] < metrics["base"]["loss"]
    merge.run(params, paths)
    merged: Any = AutoModelForCausalLM.from_pretrained(paths.merged, dtype=torch.float32)
    assert merged.get_input_embeddings().weight.shape == base.get_input_embeddings().weight.shape
    assert AutoTokenizer.from_pretrained(paths.merged).convert_tokens_to_ids(TOKENS) == ids


@pytest.mark.slow
def test_the_adapter_with_its_tokenizer_loads_on_the_published_base(made: tuple[Callable[..., Params], Paths]) -> None:
    make, paths = made
    params = make(data={"near_duplicates": "keep"}, train={"max_steps": 1}, quantization={"storage": "none"})
    for stage in (fetch, prepare, train):
        stage.run(params, paths)
    folder = paths.adapter / "adapter_config.json"
    folder.write_text(
        json.dumps(json.loads(folder.read_text()) | {"base_model_name_or_path": str(paths.root / "source")})
    )
    write_manifest(paths.adapter)
    model = AutoPeftModelForCausalLM.from_pretrained(paths.adapter)
    tokenizer = AutoTokenizer.from_pretrained(paths.adapter)
    trained = load_file(paths.adapter / "adapter_model.safetensors")
    rows = next(values for name, values in trained.items() if "embed_tokens" in name)
    ids = tokenizer.convert_tokens_to_ids(TOKENS)
    torch.testing.assert_close(model.get_input_embeddings()(torch.tensor(ids)).float(), rows.float(), atol=0.01, rtol=0)


def test_a_template_that_changes_after_the_fetch_is_found(made: tuple[Callable[..., Params], Paths]) -> None:
    make, paths = made
    params = make()
    fetch.run(params, paths)
    (paths.root / "data" / "chat.jinja").write_text(TEMPLATE + " ")
    with pytest.raises(DataError, match="has changed since the base was fetched"):
        prepare.run(params, paths)


def test_reasoning_is_left_out_by_choice(made: tuple[Callable[..., Params], Paths]) -> None:
    make, paths = made
    params = make(data={"reasoning": "none", "near_duplicates": "keep"})
    fetch.run(params, paths)
    prepare.run(params, paths)
    assert not any("<think>" in row["completion"] for row in parquet.read_table(paths.split("train")).to_pylist())


def test_a_field_is_named_with_its_file_and_line(made: tuple[Callable[..., Params], Paths]) -> None:
    make, paths = made
    params = make(data={"ignored_fields": []})
    fetch.run(params, paths)
    with pytest.raises(DataError, match=r"rows\.jsonl:1: turn 2 \(assistant\) has id, which the chat template"):
        prepare.run(params, paths)


def test_a_method_without_token_rows_is_refused(made: tuple[Callable[..., Params], Paths]) -> None:
    make, paths = made
    params = make(data={"near_duplicates": "keep"}, method=IA3)
    fetch.run(params, paths)
    prepare.run(params, paths)
    with pytest.raises(StageError, match=r"data\.special_tokens: IA3 cannot train"):
        train.run(params, paths)
