"""`peftcore import`: another tool's file becomes a project, and what has no counterpart is said first."""

import json
from pathlib import Path

import pytest
from command_line import peftcore

from flows.params import load_params

AXOLOTL = (
    "base_model: example/model\nadapter: qlora\nlora_r: 4\nlora_alpha: 8\nlearning_rate: 1e-4\nsequence_len: 256\n"
)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    lines = [json.dumps({"prompt": f"What is {n} + 1?", "completion": f"It is {n + 1}."}) for n in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return tmp_path / "rows.jsonl"


def test_a_project_trains_by_the_files_values(rows: Path, tmp_path: Path) -> None:
    file = tmp_path / "qlora.yaml"
    file.write_text(f"{AXOLOTL}datasets: [{{path: {rows}, type: chat_template}}]\nlogging_steps: 5\n")
    done = peftcore("import", "axolotl", str(file), str(tmp_path / "new"), "--hardware", "gpu")
    assert done.exit_code == 0, done.stderr
    assert "lora_r  ->  method.r: 4" in done.stdout and "logging_steps: only what is logged" in done.stdout
    params = load_params(tmp_path / "new" / "params.yaml")
    assert params.base.source == "hub:example/model" and params.data.source == "data/rows.jsonl"
    assert params.method.r == 4 and params.method.lora_alpha == 8 and params.quantization.storage == "nf4"
    assert params.train.batch_size == 1 and params.train.optimizer == "adamw"  # Axolotl's defaults, not the preset's
    assert params.gate.min_eos_rate == 0.9  # of the preset


def test_a_key_without_counterpart_writes_nothing_until_it_is_left_out(rows: Path, tmp_path: Path) -> None:
    file, root = tmp_path / "train.yaml", tmp_path / "new"
    file.write_text("model_name_or_path: a/b\nuse_galore: true\nstage: sft\n")
    command = ["import", "llamafactory", str(file), str(root), "--data", str(rows), "--hardware", "cpu"]
    refused = peftcore(*command)
    assert refused.exit_code == 1 and "--leave-out use_galore" in refused.stderr and not root.exists()
    done = peftcore(*command, "--leave-out", "use_galore", "--json")
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["left_out"] == {"use_galore": "galore is not built"} and "params.yaml" in result["files"]
    assert load_params(root / "params.yaml").train.learning_rate == 5e-5


def test_a_folder_that_cannot_be_made_is_one_message(rows: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(AXOLOTL)
    refused = peftcore("import", "axolotl", str(file), str(rows / "new"), "--data", str(rows), "--hardware", "cpu")
    assert refused.exit_code == 1 and "cannot be made: Not a directory; choose another folder" in refused.stderr


def test_a_file_without_data_needs_the_option(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(AXOLOTL)
    done = peftcore("import", "axolotl", str(tmp_path / "a.yaml"), str(tmp_path / "new"))
    assert done.exit_code == 1 and "names no data; give --data FILE" in done.stderr
    done = peftcore("import", "axolotl", str(tmp_path / "a.yaml"), str(tmp_path / "new"), "--hardware", "tpu")
    assert done.exit_code == 1 and "cpu, gpu" in done.stderr
