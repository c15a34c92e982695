"""Charts show names out of the data as they are."""

from pathlib import Path

import pytest

from flows.charts.curves import headline_bars, loss_curves, reliability, reward_curve, slice_dumbbells


@pytest.mark.parametrize("name", ["$x_$", "$", "a$b$c", r"\frac", "$$", "<b>&"])
def test_a_slice_s_name_is_no_mathematics(name: str) -> None:
    chart = slice_dumbbells({name: {"rows": 3, "base_loss": 2.0, "adapter_loss": 1.0}})
    shown = name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert f"{shown} (3)" in chart


def test_long_and_foreign_names_leave_room_for_the_chart() -> None:
    figures = {"rows": 3, "base_loss": 2.0, "adapter_loss": 1.0}
    chart = slice_dumbbells({"x" * 3000: figures, "two\nlines": figures, "日本語": figures})  # a warning is an error
    assert f"{'x' * 59}… (3)" in chart and "two lines (3)" in chart and "日本語 (3)" in chart


def test_losses_have_their_unit(tmp_path: Path) -> None:
    table = tmp_path / "loss.csv"
    table.write_text("step,train_loss,validation_loss,learning_rate\n1,2.0,1.5,0.001\n")
    drawn = loss_curves(table, 1, "nats per row")
    assert "nats per row" in drawn and "token" not in drawn and "best: 1.500 at step 1" in drawn


def test_figures_of_a_search_and_a_figure_alone_are_drawn() -> None:
    search = {"loss": 1.5, "recall_at_1": 0.64, "recall_at_5": 0.88, "recall_at_10": 0.96, "ndcg_at_10": 0.79}
    drawn = str(headline_bars({"loss": 1.9}, search))
    assert 'aria-label="Base against adapter: Test loss, Recall@1, Recall@10, nDCG@10"' in drawn
    assert "64.0%" in drawn and "0.790" in drawn
    assert 'aria-label="Base against adapter: Test loss"' in str(headline_bars({"loss": 1.9}, {"loss": 1.5}))


def test_a_reliability_plot_names_both_errors() -> None:
    side = {"ece": 0.05, "bins": [{"share": 1.0, "accuracy": 0.5, "confidence": 0.55}]}
    drawn = str(reliability(side, side | {"ece": 0.125}))
    assert "base (ECE 0.050)" in drawn and "adapter (ECE 0.125)" in drawn
    assert 'aria-label="Accuracy by confidence, base against adapter"' in drawn


def test_a_run_without_rewards_has_no_reward_curve() -> None:
    assert reward_curve([]) is None
    assert reward_curve([{"step": 1, "reward": None}]) is None


def test_a_reward_curve_skips_steps_without_a_reward() -> None:
    rewarded = {"reward": 0.5, "reward_deviation": 0.25, "equal_groups": 0.5}
    records = [{"step": 1, **rewarded}, {"step": 2, **dict.fromkeys(rewarded)}, {"step": 3, **rewarded, "reward": 1.0}]
    drawn = str(reward_curve(records))
    assert "mean (smoothed)" in drawn and "equal groups" in drawn
    assert 'aria-label="Reward of generated answers by optimiser step"' in drawn
