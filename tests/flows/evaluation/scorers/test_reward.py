"""The scorer by a reward model: an adapter's folder or a registered version, and models that cannot give rewards."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from flows.base.identity import base_identity
from flows.errors import StageError
from flows.evaluation.scorers.load import check_scorers, load_scorer
from flows.evaluation.scorers.reward import LazyReward
from flows.params import Scorer
from flows.runtime.project import dvc
from flows.stages import register
from peftcore import LoraConfig, TaskType, get_peft_model
from peftcore.files import sha256, write_manifest

PROMPT = "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n"


def write_adapter(base: Path, folder: Path, labels: int = 1, task: TaskType = TaskType.SEQ_CLS) -> Any:
    """A reward model (or a classifier of several labels) on a base, and its adapter in a folder."""
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels, dtype=torch.bfloat16)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type=task, init_lora_weights=False)
    adapted = get_peft_model(model, config)
    adapted.save_pretrained(folder)
    return adapted.eval()


def scorer(model: str, **options: str) -> Scorer:
    return Scorer.model_validate({"scorer": "reward", "options": {"model": model, **options}})


@pytest.fixture
def root(tmp_path: Path, tiny_base: Path) -> Path:
    write_adapter(tiny_base, tmp_path / "data" / "adapter")
    return tmp_path


def expected(model: Any, tokenizer: PreTrainedTokenizerBase, answer: str) -> float:
    ids = tokenizer(PROMPT + answer, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        model.config.pad_token_id = tokenizer.pad_token_id
        return model(torch.tensor([[*ids, tokenizer.eos_token_id]])).logits.item()


def test_the_score_is_the_reward_of_the_answer(root: Path, tmp_path: Path) -> None:
    base = tmp_path / "artifacts" / "base"
    model, tokenizer = write_adapter(base, root / "data" / "adapter"), AutoTokenizer.from_pretrained(base)
    score = load_scorer(scorer("data/adapter"), root)
    for answer in ("1.", "I do not know."):
        assert score(PROMPT, answer, "any", {}) == pytest.approx(expected(model, tokenizer, answer), abs=0.02)
    assert score(PROMPT, "1.", "", {}) != score(PROMPT, "I do not know.", "", {})
    other = load_scorer(scorer("data/adapter", base=f"path:{base}"), root)
    assert other(PROMPT, "1.", "", {}) == score(PROMPT, "1.", "", {})
    reward = LazyReward(root, str(root / "data" / "adapter"))  # the shape of a reward for training
    assert reward(PROMPT, "1.", {"id": "a"}) == score(PROMPT, "1.", "", {})


def test_a_check_before_training_loads_no_model(tmp_path: Path) -> None:
    check_scorers([scorer("data/none"), scorer("mail@v0.1.0")], tmp_path)


def test_models_that_give_no_rewards_are_refused(root: Path, tiny_base: Path) -> None:
    def refused(folder: str, message: str, **options: str) -> None:
        with pytest.raises(StageError, match=rf"the reward model .*{folder}: .*{message}"):
            load_scorer(scorer(f"data/{folder}", **options), root)(PROMPT, "1.", "", {})

    write_adapter(tiny_base, root / "data" / "classifier", 3)
    refused("classifier", "is a classifier of 3 classes")
    refused("none", r"there is no .*adapter_config.json; give the folder of an adapter")
    refused("adapter", r"base.source path:nowhere: there is no", base="path:nowhere")
    shutil.rmtree(tiny_base)
    refused("adapter", r"there is no base model in .*; run `peftcore stage fetch` first")


def test_another_tokenizer_or_template_is_refused(root: Path, tiny_base: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_base, tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = tokenizer.chat_template.replace("user", "human") + " "
    tokenizer.save_pretrained(tmp_path / "other")
    score = load_scorer(scorer("data/adapter", base=f"path:{tmp_path / 'other'}"), root)
    with pytest.raises(StageError, match=r"its chat template differs .*same data.chat_template"):
        score(PROMPT, "1.", "", {})
    tokenizer.add_tokens(["<|new|>"])
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(StageError, match="its tokenizer differs from that of this project's base in 1 entries"):
        load_scorer(scorer("data/adapter", base=f"path:{tmp_path / 'other'}"), root)(PROMPT, "1.", "", {})


# -- registered versions -------------------------------------------------------------------------------------------


def test_a_registered_version_is_loaded_with_its_base(
    project: Any, write_tiny_base: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_tiny_base(project.paths.base)
    if not (base / "SHA256SUMS").exists():
        write_manifest(base)
    shutil.rmtree(project.root / "source" / "adapter")
    model = write_adapter(base, project.root / "source" / "adapter")
    params = "project: {name: docstrings}\nregister: {remote: local}\nquantization: {storage: none}\n"
    project.paths.params.write_text(params + "data: {source: a.jsonl, kind: preference}\ntrain: {objective: reward}\n")
    metrics = project.root / "source" / "evaluation" / "metrics.json"
    figures = json.loads(metrics.read_text()) | {
        "base_model": base_identity(base),
        "base_manifest": sha256(base / "SHA256SUMS"),
    }
    metrics.write_text(json.dumps(figures))
    dvc(project.root, "repro", "--quiet", "make")
    register.run(project.params, project.paths)
    tokenizer = AutoTokenizer.from_pretrained(base)
    score = load_scorer(scorer("docstrings@v0.1.0"), project.root)
    assert score(PROMPT, "1.", "", {}) == pytest.approx(expected(model, tokenizer, "1."), abs=0.02)
    with pytest.raises(StageError, match=r"there is no such version; did you mean docstrings@v0.1.0\?"):
        load_scorer(scorer("docstrings@v0.1.1"), project.root)(PROMPT, "1.", "", {})
    with pytest.raises(StageError, match="no version of mail is registered here"):
        load_scorer(scorer("mail@v0.1.0"), project.root)(PROMPT, "1.", "", {})


def test_a_version_of_another_objective_is_refused(registered: Any) -> None:
    with pytest.raises(StageError, match=r"its train\.objective is sft; give a version with train\.objective reward"):
        load_scorer(scorer("docstrings@v0.1.0"), registered.root)(PROMPT, "1.", "", {})
