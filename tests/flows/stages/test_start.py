"""The start stage: nothing, or a version's adapter as it was registered."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from datasets import Dataset
from pyarrow import parquet

from flows.data.encoders import COLUMNS, Kind
from flows.data.tokens import AnswerTokens, AnyTokens, PairTokens, RetrievalTokens, TagTokens, TargetTokens, TextTokens
from flows.data.tokens import Tokens as ChatTokens
from flows.errors import RegistryError
from flows.paths import Paths
from flows.runtime.worktree import worktree_at
from flows.stages import start
from peftcore.files import read_manifest


def with_start(project: Any, version: str | None) -> Any:
    return project.params.model_copy(update={"train": project.params.train.model_copy(update={"start_from": version})})


@pytest.fixture(autouse=True)
def prepared_rows(project: Any) -> None:
    """What the versions have learned."""
    for name in ("train", "validation"):
        table = pyarrow.table({"prompt": [f"{name} question"], "completion": [f"{name} answer"]})
        parquet.write_table(table, project.root / "source" / "data" / f"{name}.parquet")


@pytest.mark.slow
def test_nothing_or_a_versions_adapter_in_a_working_tree_as_well(project: Any) -> None:
    first = project.register(weight=2.0)["adapter"]["files"]
    project.register(weight=3.0)
    start.run(with_start(project, "v0.1.0"), project.paths)
    assert read_manifest(project.paths.start_adapter) == first
    assert json.loads(project.paths.start_source.read_text()) == {"version": "v0.1.0"}
    assert parquet.read_table(project.paths.start_learned).to_pylist() == [
        {"question": f"{name} question", "answer": f"{name} answer"} for name in ("train", "validation")
    ]
    start.run(with_start(project, None), project.paths)
    assert [path.name for path in project.paths.start.iterdir()] == ["source.json"]
    with worktree_at(project.root, "HEAD") as tree:
        start.run(with_start(project, "v0.1.0"), Paths(tree))
        assert read_manifest(Paths(tree).start_adapter) == first


def test_a_teacher_comes_with_its_adapter_alone(project: Any) -> None:
    first = project.register(weight=2.0)["adapter"]["files"]
    distillation = project.params.train.distillation.model_copy(update={"teacher": "v0.1.0"})
    train = project.params.train.model_copy(update={"distillation": distillation})
    start.run(project.params.model_copy(update={"train": train}), project.paths)
    assert read_manifest(project.paths.teacher_adapter) == first
    assert json.loads(project.paths.teacher_source.read_text()) == {"version": "v0.1.0"}
    assert json.loads(project.paths.start_source.read_text()) == {"version": None}
    assert not project.paths.start_adapter.exists() and not project.paths.start_learned.exists()


def test_a_version_that_is_unknown_or_damaged_leaves_what_was_there(project: Any) -> None:
    project.register(weight=2.0)
    start.run(with_start(project, "v0.1.0"), project.paths)
    with pytest.raises(RegistryError, match=r"no version v9\.9\.9; there is: v0\.1\.0"):
        start.run(with_start(project, "v9.9.9"), project.paths)
    for path in [*(project.root / ".dvc" / "cache").rglob("*"), *(project.root / ".dvc-remote").rglob("*")]:
        if (
            path.is_file()
            and path.stat().st_size == (project.paths.adapter / "adapter_model.safetensors").stat().st_size
        ):
            path.chmod(0o644)
            path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(RegistryError, match="is not what was registered"):
        start.run(with_start(project, "v0.1.0"), project.paths)
    assert project.paths.start_adapter.is_dir()


CHAT = ChatTokens([1, 2], [-100, 2], 1, "question", "answer")
PREPARED: dict[Kind, AnyTokens] = {
    "chat": CHAT,
    "text": CHAT,
    "preference": PairTokens("question", "answer", "other", 1, [([1, 2], [-100, 2]), ([1, 3], [-100, 3])]),
    "unpaired_preference": AnswerTokens([1, 2], [-100, 2], 1, "question", "answer", True),
    "classification": TextTokens("question", [1], 0, "answer"),
    "token_classification": TagTokens(["question"], ["answer"], [1], [0]),
    "seq2seq": TargetTokens("question", "answer", [1], [2]),
    "retrieval": RetrievalTokens("question", "answer", ["other"], [1], [2], [[3]]),
}
"""{kind: a row as the prepare stage writes it}"""


@pytest.mark.parametrize("kind", COLUMNS)
def test_rows_of_each_kind_have_a_question_and_an_answer(kind: Kind, tmp_path: Path) -> None:
    tokens = PREPARED[kind]
    origin = {"id": tokens.id, "group": "all", "slice": "all", "weight": 1.0}
    values = tokens.columns() | origin
    row = {name: [values[name]] for name in COLUMNS[kind]}
    Dataset.from_dict(row, features=COLUMNS[kind]).to_parquet(tmp_path / "train.parquet")
    learned = start._texts(tmp_path / "train.parquet", "docstrings@v0.1.0")
    assert learned.to_pylist() == [{"question": "question", "answer": "answer"}]
