import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from flows.data.rows import Row
from flows.evaluation import fidelity as module
from flows.evaluation.fidelity import Reference, fidelity, reward_fidelity, same_function


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def rows() -> list[Row]:
    ids = [torch.randint(40, (length,), generator=torch.Generator().manual_seed(length)).tolist() for length in (6, 9)]
    return [{"input_ids": one, "labels": [-100, -100, *one[2:]]} for one in ids]


def test_a_model_agrees_with_itself(model: LlamaForCausalLM, rows: list[Row]) -> None:
    found = fidelity(Reference(model, rows, 0, 2), model)
    assert found.kl == pytest.approx(0, abs=1e-7) and found.top1_agreement == 1.0
    assert found.tokens == 4 + 7 and found.loss == found.reference_loss


def test_divergence_is_that_from_the_reference_to_the_candidate(model: LlamaForCausalLM, rows: list[Row]) -> None:
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.add_(0.3 * torch.randn_like(other.lm_head.weight))
    total, agreed, tokens, losses = 0.0, 0, 0, [0.0, 0.0]
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            p, q = (m(ids).logits[0, 1:-1].double().log_softmax(-1) for m in (model, other))
        total += float((p.exp() * (p - q)).sum())
        agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
        answers = ids[0, 2:, None]
        losses = [loss - float(m.gather(1, answers).sum()) for loss, m in zip(losses, (p, q), strict=True)]
        tokens += len(p)
    found = fidelity(Reference(model, rows, 0, 1), other)
    assert found.kl == pytest.approx(total / tokens, rel=1e-4) and found.kl > 0.01
    assert found.top1_agreement == agreed / tokens
    assert [found.reference_loss, found.loss] == pytest.approx([loss / tokens for loss in losses], rel=1e-5)


@pytest.mark.parametrize("room", [0, 40 * 7 * 4, 2**20])
def test_kept_predictions_of_the_reference_give_the_same_numbers(
    model: LlamaForCausalLM, rows: list[Row], room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_KEPT", room)  # none, the longer row alone (7 tokens of 40 floats), or all
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.add_(0.3 * torch.randn_like(other.lm_head.weight))
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    reference = Reference(model, rows, 0, 1)
    first = fidelity(reference, other)
    calls.clear()
    assert fidelity(reference, other) == first
    assert len(calls) == {0: 2, 40 * 7 * 4: 1, 2**20: 0}[room]


def test_models_are_the_same_function_only_with_the_same_tensors_and_settings(model: LlamaForCausalLM) -> None:
    assert same_function(model, copy.deepcopy(model))
    other = copy.deepcopy(model)
    other.config.rope_parameters["rope_theta"] = 5.0
    assert not same_function(model, other)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1e-3
    assert not same_function(model, other)
    assert not same_function(model, copy.deepcopy(model).half())


def test_reward_models_are_compared_by_the_probabilities_of_their_preferences() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_labels=1, pad_token_id=0,
    )  # fmt: skip
    model, ids = LlamaForSequenceClassification(config).eval(), torch.randint(1, 40, (4, 2, 6)).tolist()
    rows: list[Row] = [{"chosen_input_ids": one, "rejected_input_ids": other} for one, other in ids]
    reference = Reference(model, rows, 0, 2)
    same = reward_fidelity(reference, model)
    assert same.kl == pytest.approx(0, abs=1e-12) and same.top1_agreement == 1.0 and same.tokens == 4
    opposite = copy.deepcopy(model)
    with torch.no_grad():
        opposite.score.weight.neg_()
        margins = [float((model(torch.tensor([a])).logits - model(torch.tensor([b])).logits).item()) for a, b in ids]
    found = reward_fidelity(reference, opposite)
    p = torch.tensor(margins, dtype=torch.float64).sigmoid()
    q = 1 - p
    assert found.kl == pytest.approx((p * (p / q).log() + q * (q / p).log()).mean().item(), rel=1e-4)
    assert found.top1_agreement == 0.0
    assert found.reference_loss == pytest.approx(-p.log().mean().item(), rel=1e-4)
    assert found.loss == pytest.approx(-q.log().mean().item(), rel=1e-4)
