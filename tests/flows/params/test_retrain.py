"""Section `retrain`: shares, times and limits of drift that can be met."""

from pathlib import Path

import pytest
from params_texts import read, refusal


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("{replay_share: 1}", "replay_share"),
        ("{retries: -1}", "retries"),
        ("{retries: 1.5}", "retries"),
        ("{retry_delay: .inf}", "retry_delay"),
        ("{stage_timeout: 0}", "stage_timeout"),
        ("{same_name: rename}", "same_name"),
        ("{incoming: ''}", "incoming"),
        ("{notify: [mail, '']}", "notify.1"),
        ("{notify: mail}", "notify"),
        ("{untrusted: ['']}", "untrusted.0"),
        ("{untrusted_rows: use}", "untrusted_rows"),
        ("{drift: {rows: 1}}", "drift.rows"),
        ("{drift: {min_rows: 1}}", "drift.min_rows"),
        ("{drift: {max_loss_gap: 0}}", "drift.max_loss_gap"),
        ("{drift: {max_divergence: 1.1}}", "drift.max_divergence"),
    ],
)
def test_an_impossible_value_is_refused_by_its_key(tmp_path: Path, text: str, key: str) -> None:
    assert refusal(tmp_path, f"retrain: {text}").startswith(f"params.yaml:1: retrain.{key}: ")


def test_drift_may_be_allowed_without_limit(tmp_path: Path) -> None:
    drift = read(tmp_path, "retrain: {drift: {max_loss_gap: null, max_divergence: null}}").retrain.drift
    assert (drift.max_loss_gap, drift.max_divergence) == (None, None)
    assert read(tmp_path, "retrain: {drift: {max_divergence: 1}}").retrain.drift.max_divergence == 1.0


def test_untrusted_files_are_those_of_the_folder_feedback_or_of_other_names(tmp_path: Path) -> None:
    retrain = read(tmp_path, "retrain: {}").retrain
    assert [retrain.is_untrusted(name) for name in ("feedback/a.jsonl", "feedback/b/a.jsonl", "a.jsonl")] == [1, 1, 0]
    other = read(tmp_path, "retrain: {untrusted: ['users-*']}").retrain
    assert [other.is_untrusted(name) for name in ("feedback/a.jsonl", "users-1.jsonl")] == [False, True]
    assert not read(tmp_path, "retrain: {untrusted: []}").retrain.is_untrusted("feedback/a.jsonl")


def test_a_time_may_be_a_whole_number_and_no_delay_is_one(tmp_path: Path) -> None:
    retrain = read(tmp_path, "retrain: {retry_delay: 0, stage_timeout: 60, replay_share: 0}").retrain
    assert (retrain.retry_delay, retrain.stage_timeout, retrain.replay_share) == (0.0, 60.0, 0.0)
