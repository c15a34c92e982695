"""Preference losses: the papers' formulas, their gradients, and TRL's numbers."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from quiet_training import tiny_llama
from tiny_pairs import log_prob, pairs
from torch.nn import functional as F

from peftcore import ConfigError, PeftModel
from peftcore.train import Dpo, Orpo, PairLogProbs, PreferenceCollator, SimPo, pair_log_probs, reference_acting

TOKENS = torch.tensor([3, 5, 2]), torch.tensor([4, 1, 6])


def log_probs(*values: list[float], requires_grad: bool = False) -> PairLogProbs:
    chosen, rejected = (torch.tensor(value, dtype=torch.float64, requires_grad=requires_grad) for value in values)
    return PairLogProbs(chosen, rejected, *TOKENS)


POLICY, REFERENCE = ([-3.0, -9.0, -2.5], [-6.0, -1.5, -7.0]), ([-4.0, -8.0, -2.0], [-5.0, -2.5, -6.5])
RATIOS = [(p - r) - (q - s) for p, r, q, s in zip(POLICY[0], REFERENCE[0], POLICY[1], REFERENCE[1], strict=True)]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_dpo_is_the_papers_formula(smoothing: float) -> None:
    losses, figures = Dpo(beta=0.3, label_smoothing=smoothing).losses(log_probs(*POLICY), log_probs(*REFERENCE))
    for loss, h in zip(losses.tolist(), RATIOS, strict=True):
        expected = -(1 - smoothing) * math.log(sigmoid(0.3 * h)) - smoothing * math.log(sigmoid(-0.3 * h))
        assert loss == pytest.approx(expected, rel=1e-12)
    assert figures["rewards/margins"].tolist() == pytest.approx([0.3 * h for h in RATIOS])
    assert figures["rewards/accuracies"].tolist() == [float(h > 0) for h in RATIOS]
    assert figures["rewards/chosen"].tolist() == pytest.approx([0.3, -0.3, -0.15])
    assert figures["logps/rejected"].tolist() == POLICY[1]


def test_its_gradient_is_weighted_by_how_wrong_the_implicit_reward_is() -> None:
    # arXiv:2305.18290, section 4: −β σ(r̂⁻ − r̂⁺) (∇ log π(y⁺) − ∇ log π(y⁻))
    policy = log_probs(*POLICY, requires_grad=True)
    Dpo(beta=0.3).losses(policy, log_probs(*REFERENCE))[0].sum().backward()
    expected = [-0.3 * sigmoid(-0.3 * h) for h in RATIOS]
    assert policy.chosen.grad is not None and policy.rejected.grad is not None
    assert policy.chosen.grad.tolist() == pytest.approx(expected, rel=1e-12)
    assert policy.rejected.grad.tolist() == pytest.approx([-g for g in expected], rel=1e-12)


def test_a_model_that_is_its_reference_has_a_loss_of_log_two() -> None:
    losses, figures = Dpo().losses(log_probs(*POLICY), log_probs(*POLICY))
    assert losses.tolist() == pytest.approx([math.log(2)] * 3)
    assert not figures["rewards/margins"].any()


def test_ipo_regresses_mean_ratios_to_its_target_and_hinge_has_a_margin() -> None:
    policy, reference = log_probs(*POLICY), log_probs(*REFERENCE)
    ratio = (policy.chosen - reference.chosen) / TOKENS[0] - (policy.rejected - reference.rejected) / TOKENS[1]
    ipo, _ = Dpo(beta=0.2, loss="ipo").losses(policy, reference)
    torch.testing.assert_close(ipo, (ratio - 2.5) ** 2)
    hinge, _ = Dpo(beta=0.3, loss="hinge").losses(policy, reference)
    assert hinge.tolist() == pytest.approx([max(0.0, 1 - 0.3 * h) for h in RATIOS])
    normalized, _ = Dpo(beta=2.0, length_normalized=True).losses(policy, reference)
    torch.testing.assert_close(normalized, -F.logsigmoid(2.0 * ratio))


def test_rpo_adds_the_chosen_answers_mean_token_loss() -> None:
    plain, _ = Dpo().losses(log_probs(*POLICY), log_probs(*REFERENCE))
    added, figures = Dpo(rpo_alpha=0.5).losses(log_probs(*POLICY), log_probs(*REFERENCE))
    means = torch.tensor([1.0, 9 / 5, 2.5 / 2], dtype=torch.float64)
    torch.testing.assert_close(added - plain, 0.5 * means)
    torch.testing.assert_close(figures["nll"], means)


def test_orpo_is_the_papers_formula() -> None:
    losses, figures = Orpo(beta=0.25).losses(log_probs(*POLICY), None)
    for i, loss in enumerate(losses.tolist()):
        p, q = (math.exp(POLICY[side][i] / TOKENS[side][i].item()) for side in (0, 1))
        ratio = math.log((p / (1 - p)) / (q / (1 - q)))
        assert figures["log_odds_chosen"][i].item() == pytest.approx(ratio, rel=1e-12)
        assert loss == pytest.approx(-math.log(p) - 0.25 * math.log(sigmoid(ratio)), rel=1e-12)


def test_simpo_is_the_papers_formula() -> None:
    losses, figures = SimPo(beta=2.5, gamma=1.5).losses(log_probs(*POLICY), None)
    added, _ = SimPo(beta=2.5, gamma=1.5, likelihood_weight=0.3).losses(log_probs(*POLICY), None)
    for i, loss in enumerate(losses.tolist()):
        chosen, rejected = (POLICY[side][i] / TOKENS[side][i].item() for side in (0, 1))
        assert loss == pytest.approx(-math.log(sigmoid(2.5 * (chosen - rejected) - 1.5)), rel=1e-12)
        assert added[i].item() == pytest.approx(loss - 0.3 * chosen, rel=1e-12)
        assert figures["rewards/margins"][i].item() == pytest.approx(2.5 * (chosen - rejected), rel=1e-12)


def test_simpos_gradient_is_that_of_finite_differences() -> None:
    def loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        return SimPo(likelihood_weight=0.2).losses(PairLogProbs(chosen, rejected, *TOKENS), None)[0]

    given = log_probs(*POLICY, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (given.chosen, given.rejected))


def test_orpos_gradient_is_that_of_finite_differences() -> None:
    def loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        return Orpo(beta=0.7).losses(PairLogProbs(chosen, rejected, *TOKENS), None)[0]

    given = log_probs(*POLICY, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (given.chosen, given.rejected))


def test_odds_stay_finite_where_an_answer_is_certain() -> None:
    certain = log_probs([0.0, -1e-20, -1e-3], [-800.0, -1.0, -2.0], requires_grad=True)
    losses, _ = Orpo().losses(certain, None)
    losses.sum().backward()
    assert losses.isfinite().all() and certain.chosen.grad is not None and certain.chosen.grad.isfinite().all()


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (lambda: Dpo(beta=0.0), "beta must be above 0; got 0"),
        (lambda: Orpo(beta=-1.0), "beta must be above 0; got -1"),
        (lambda: Dpo(loss="kto"), "one of sigmoid, ipo, hinge; got 'kto'"),  # pyright: ignore[reportArgumentType]
        (lambda: Dpo(label_smoothing=0.5), "below 0.5; got 0.5"),
        (lambda: Dpo(loss="ipo", label_smoothing=0.1), "for the sigmoid loss"),
        (lambda: Dpo(rpo_alpha=-0.1), "rpo_alpha must be at least 0"),
        (lambda: SimPo(beta=0.0), "beta must be above 0; got 0"),
        (lambda: SimPo(gamma=-0.5), "gamma must be at least 0; got -0.5"),
        (lambda: SimPo(likelihood_weight=-1.0), "likelihood_weight must be at least 0"),
    ],
)
def test_values_that_cannot_be_are_refused(make: Any, fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        make()


# -- TRL -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batch() -> dict[str, torch.Tensor]:
    return PreferenceCollator(0)(pairs(4))


@pytest.fixture(scope="module")
def trl_trainer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """TRL's DPOTrainer over HF PEFT's LoRA, and where that adapter is saved."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft
        from datasets import Dataset
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast
        from trl import DPOConfig, DPOTrainer

        words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "a": 2, "b": 3}, unk_token="<pad>"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>"
        )
        folder = tmp_path_factory.mktemp("trl")
        options = {"disable_tqdm": True, "report_to": [], "use_cpu": True, "bf16": False, "log_level": "error"}
        trainer = DPOTrainer(
            model=tiny_llama(),
            args=DPOConfig(output_dir=str(folder), gradient_checkpointing=False, disable_dropout=True, **options),
            train_dataset=Dataset.from_list([{"prompt": "a b", "chosen": " a", "rejected": " b"}]),
            processing_class=tokenizer,
            peft_config=peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
        )
    trainer.model.save_pretrained(folder / "adapter")
    trainer.model.double().eval()
    return trainer


def ours(trainer: Any) -> Any:
    folder = Path(trainer.args.output_dir) / "adapter"
    return PeftModel.from_pretrained(tiny_llama(), folder, is_trainable=True).double().eval()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # TRL's own call
@pytest.mark.parametrize(
    ("objective", "kind"),
    [
        (Dpo(beta=0.3), "sigmoid"),
        (Dpo(beta=0.3, loss="ipo"), "ipo"),
        (Dpo(beta=0.3, loss="hinge"), "hinge"),
        (Dpo(beta=2.0, length_normalized=True), "sigmoid_norm"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_losses_figures_and_gradients_are_trls(
    trl_trainer: Any, batch: dict[str, torch.Tensor], objective: Dpo, kind: str
) -> None:
    trl_trainer.loss_types, trl_trainer.loss_weights, trl_trainer.beta = [kind], [1.0], objective.beta
    trl_trainer._metrics["train"].clear()
    trl_trainer._metrics["eval"].clear()
    trl_trainer.model.zero_grad()
    halves = {name: tensor.transpose(0, 1).flatten(0, 1) for name, tensor in batch.items() if tensor.dim() == 3}
    completions = (halves.pop("labels") != -100).long()
    inputs = halves | {"completion_mask": completions}  # TRL has all chosen answers before all rejected ones
    expected = trl_trainer._compute_loss(trl_trainer.model, inputs, False)
    expected.backward()
    model = ours(trl_trainer)
    policy = pair_log_probs(model, batch)
    with reference_acting(model):
        reference = pair_log_probs(model, batch)
    losses, figures = objective.losses(policy, reference)
    losses.mean().backward()
    assert losses.mean().item() == pytest.approx(expected.item(), rel=1e-6)
    found = trl_trainer._metrics["eval"] or trl_trainer._metrics["train"]
    for name in ("logps/chosen", "logps/rejected"):
        assert figures[name].mean().item() == pytest.approx(found[name][0], rel=1e-6)
    theirs = {
        name.removeprefix("base_model.model."): p.grad
        for name, p in trl_trainer.model.named_parameters()
        if p.requires_grad
    }
    mine = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert mine.keys() == theirs.keys() and len(mine) == 28
    for name, gradient in mine.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-6)  # TRL takes logits to float32


def test_orpos_odds_are_trls(trl_trainer: Any) -> None:
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    rows, model = pairs(4), ours(trl_trainer)
    with torch.no_grad():
        means = [
            torch.stack([log_prob(model, r[f"{s}_input_ids"], r[f"{s}_labels"]) for r in rows])
            / torch.tensor([sum(label != -100 for label in r[f"{s}_labels"]) for r in rows])
            for s in ("chosen", "rejected")
        ]
        losses, figures = Orpo(beta=0.4).losses(pair_log_probs(model, PreferenceCollator(0)(rows)), None)
    fake: Any = SimpleNamespace(beta=0.4, accelerator=SimpleNamespace(device="cpu"))
    odds, chosen, rejected, log_odds_ratio, log_odds_chosen = ORPOTrainer.odds_ratio_loss(fake, *means)
    torch.testing.assert_close(losses, -means[0] - odds.double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(figures["rewards/chosen"], chosen.double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(figures["rewards/rejected"], rejected.double(), rtol=1e-5, atol=1e-6)
    assert figures["log_odds_ratio"].mean().item() == pytest.approx(log_odds_ratio.item(), rel=1e-5)
    assert figures["log_odds_chosen"].mean().item() == pytest.approx(log_odds_chosen.item(), rel=1e-5)


def test_simpos_losses_are_trls() -> None:
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    policy = log_probs(*POLICY)
    losses, figures = SimPo(beta=1.7, gamma=0.6).losses(policy, None)
    fake: Any = SimpleNamespace(
        beta=1.7, simpo_gamma=0.6, alpha=0.0, label_smoothing=0.0, loss_type="simpo",
        accelerator=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    means = policy.per_token()
    expected, chosen, rejected = CPOTrainer.cpo_loss(fake, means.chosen, means.rejected)  # type: ignore[arg-type]
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(figures["rewards/chosen"], chosen)
    torch.testing.assert_close(figures["rewards/rejected"], rejected)
