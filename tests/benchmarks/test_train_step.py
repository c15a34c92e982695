"""The train-step benchmark runs and checks what it compares; how fast anything is, is no test."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import steps
from benchmarks.steps import METHODS, Setting, check_equal, our_loss, random_base

pytestmark = [
    pytest.mark.proof,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # PEFT reads it
]
SMALL = ("--blocks", "1", "--batch", "1", "--length", "24", "--repeats", "7", "--dtype", "fp32")


def test_both_losses_and_the_machine(run_benchmark) -> None:
    done = run_benchmark("train_step", *SMALL, "--dropout", "0.1")
    assert done.returncode == 0, done.stderr
    rows = {line[:20].strip(): line[20:].split() for line in done.stdout.splitlines()[2:8]}
    assert list(rows) == ["floor", "ours", "PEFT, our loss", "floor, model's loss", "ours, model's loss", "PEFT"]
    assert {rows[name][2] for name in ("floor", "floor, model's loss")} == {"1.00"}
    assert rows["PEFT"][3] == rows["PEFT, our loss"][3] == rows["PEFT"][4] == "1.00"
    saved = [int(row[5]) for row in rows.values()]
    assert saved[0] <= saved[1] <= saved[2] and saved[3] <= saved[4] <= saved[5]
    assert all(
        ours < models for ours, models in zip(saved[:3], saved[3:], strict=True)
    )  # logits of 8 and of 24 positions
    assert re.search(r"\d+ of \d+ cores in use.*torch \d", done.stdout)


def test_a_row_alone_tells_its_peak_memory(run_benchmark) -> None:
    done = run_benchmark("train_step", *SMALL, "--alone", "ours")
    assert done.returncode == 0, done.stderr
    assert 2**27 < int(done.stdout) < 2**32  # bytes: torch alone is more than 128 MiB


@pytest.mark.parametrize("method", METHODS)
def test_ours_and_peft_agree_for_every_method(tmp_path: Path, method: str) -> None:
    base = random_base(tmp_path / "base", blocks=1)
    check_equal(Setting(base, dtype="fp32", method=method, batch=1, length=24), tmp_path / "adapter")


def test_unequal_weights_are_no_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "our_loss", lambda model, inputs, labels: 1.01 * our_loss(model, inputs, labels))
    base = random_base(tmp_path / "base", blocks=1)
    with pytest.raises(SystemExit, match=r"our loss is \d+\.\d+ and PEFT's"):
        check_equal(Setting(base, dtype="fp32", batch=1, length=24), tmp_path / "adapter")


def test_all_writes_every_setting_with_its_verdict(run_benchmark, tmp_path: Path) -> None:
    done = run_benchmark("train_step", *SMALL, "--all", "--folder", str(tmp_path / "results"))
    assert done.returncode == 0, done.stderr
    measured = json.loads((tmp_path / "results/train_step.json").read_text())
    settings = [figures["setting"] for figures in measured["settings"]]
    assert [(s["dtype"], s["storage"], s["dropout"]) for s in settings] == [
        ("bf16", "none", 0.0),
        ("bf16", "none", 0.05),
        ("fp32", "none", 0.0),
        ("bf16", "nf4", 0.0),
    ]
    text = (tmp_path / "results/train_step.md").read_text()
    assert len(re.findall(r"/ PEFT as used ≤ 0\.\d\d: (?:met|missed) \(\d+\.\d\d\)", text)) == 5  # one of memory
    assert len(re.findall(r"/ floor ≤ 1\.\d\d: (?:met|missed) \(\d+\.\d\d\)", text)) == 8


def test_too_few_repeats_are_refused(run_benchmark) -> None:
    done = run_benchmark("train_step", "--repeats", "3")
    assert done.returncode == 2
    assert "at least 7" in done.stderr
