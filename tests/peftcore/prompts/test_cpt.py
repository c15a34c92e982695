"""Context-aware prompt tuning: example tokens that may move a little, and a loss over the examples' labels too."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from method_example import randomise
from prompt_models import attach, batch, both_ways, build
from torch import Tensor

from peftcore import PeftModel, get_peft_model
from peftcore.errors import CheckpointError, ConfigError
from peftcore.prompts.cpt import CPTConfig

EXAMPLES: dict[str, Any] = {
    "task_type": "CAUSAL_LM",
    "cpt_token_ids": [5, 6, 7, 8, 9, 10, 11, 12],
    "cpt_mask": [1] * 8,
    "cpt_tokens_type_mask": [1, 2, 3, 4, 5, 6, 7, 8],
    "opt_weighted_loss_type": "decay",
    "opt_loss_decay_factor": 0.8,
    "opt_projection_epsilon": 0.2,
    "opt_projection_format_epsilon": 0.1,
}


@pytest.mark.filterwarnings("ignore")  # the oracle's own
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_parity(family: str, tmp_path: Path) -> None:
    both_ways(family, peft.CPTConfig(**EXAMPLES), CPTConfig(**EXAMPLES), tmp_path)


@pytest.mark.filterwarnings("ignore")  # the oracle's own
@pytest.mark.parametrize("weighting", ["none", "decay"])
@pytest.mark.parametrize("typed", [False, True])
def test_parity_of_the_loss_and_its_gradient(weighting: str, typed: bool) -> None:
    options = {**EXAMPLES, "opt_weighted_loss_type": weighting}
    hf, ours = peft.get_peft_model(build("llama"), peft.CPTConfig(**options)), attach("llama", CPTConfig(**options), 0)
    randomise(hf, 0.002)
    delta = ours.prompt_encoder["default"].delta_embedding.weight
    delta.data.copy_(hf.prompt_encoder["default"].delta_embedding.weight)
    labels = batch()
    labels[0, :2] = -100
    types = torch.tensor([[1, 2, 3, 4, 4, 4]] * 2)
    given = {"input_type_mask": types} if typed else {}
    losses = []
    for model in (hf, ours):
        out = model(input_ids=batch(), labels=labels, **{key: value.clone() for key, value in given.items()})
        out.loss.backward()
        losses.append(out.loss)
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(
        delta.grad, hf.prompt_encoder["default"].delta_embedding.weight.grad, rtol=1e-5, atol=1e-6
    )
    assert not delta.grad[[3, 7]].any(), "labels do not move"


def learner_of(**options: Any) -> Any:
    return get_peft_model(build("llama"), CPTConfig(**{**EXAMPLES, **options})).prompt_encoder["default"]


def test_starts_at_the_examples() -> None:
    learner = learner_of()
    table = build("llama").get_input_embeddings().weight
    torch.testing.assert_close(learner.encoded(), table[5:13], rtol=0, atol=0)


def test_moves_stay_in_their_balls() -> None:
    learner = learner_of()
    learner.delta_embedding.weight.data.normal_()
    with torch.no_grad():
        moved = (learner.encoded() - learner.vectors).norm(dim=1)
    scale = (32 / 2048) ** 0.5
    expected = torch.tensor([0.1, 0.2, 0.1, 0, 0.1, 0.2, 0.1, 0]) * scale
    torch.testing.assert_close(moved, expected, rtol=1e-5, atol=1e-6)
    learner.delta_embedding.weight.data.fill_(1e-6)
    torch.testing.assert_close(learner.projected()[0], learner.delta_embedding.weight[0].detach(), rtol=1e-6, atol=0)


def test_training_projects_before_each_forward() -> None:
    model = get_peft_model(build("llama"), CPTConfig(**EXAMPLES)).train()
    delta = model.prompt_encoder["default"].delta_embedding.weight
    optimizer = torch.optim.SGD([delta], lr=100.0)
    for _ in range(3):
        model(batch(), labels=batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (delta.norm(dim=1) > 1).any(), "a step may leave the ball"
    model(batch())
    assert (delta.detach().norm(dim=1) <= model.prompt_encoder["default"].radii()[:, 0] * (1 + 1e-5)).all()


def test_weights_decay_with_age() -> None:
    learner = learner_of()
    types = torch.tensor([[4, 4, 5, 8, 8, 9, 12]])
    expected = torch.tensor([[0.64, 0.64, 1, 0.8, 0.8, 1, 1]])
    torch.testing.assert_close(learner.weights(types), expected, rtol=0, atol=1e-6)


def by_hand(model: Any, labels: Tensor, text: Tensor) -> Tensor:
    """The mean over text and example labels, from one row's logits."""
    logits = model(text).logits[0]
    answers = torch.cat([torch.tensor([-100, -100, -100, 8, -100, -100, -100, 12]), labels])
    return torch.nn.functional.cross_entropy(logits[:-1], answers[1:])


def test_padding_changes_no_loss() -> None:
    """PEFT puts the examples before the padding; here they stay next to the text."""
    options = {name: value for name, value in EXAMPLES.items() if name != "opt_loss_decay_factor"}
    model = attach("llama", CPTConfig(**{**options, "opt_weighted_loss_type": "none"}), 0.001)
    text = batch(1, 4)
    expected = by_hand(model, text[0], text)
    for left in (True, False):
        pad = (2, 0) if left else (0, 2)
        padded, labels = (torch.nn.functional.pad(text, pad, value=v) for v in (0, -100))
        mask = torch.nn.functional.pad(torch.ones_like(text), pad)
        loss = model(padded, labels=labels, attention_mask=mask).loss
        torch.testing.assert_close(loss, expected, rtol=0, atol=1e-6)


def test_templates_alone_leave_the_text_its_labels() -> None:
    """Types that end on no label: PEFT then takes no token for a label, and its loss is not a number."""
    model = attach("llama", CPTConfig(cpt_token_ids=[5, 6, 7]), 0.001)
    expected = torch.nn.functional.cross_entropy(model(batch()).logits[:, 2:-1].flatten(0, 1), batch().flatten())
    torch.testing.assert_close(model(batch(), labels=batch()).loss, expected, rtol=0, atol=1e-6)


def test_accumulated_losses_add_up_to_their_mean() -> None:
    model = attach("llama", CPTConfig(**EXAMPLES), 0.001)
    whole, items = model(batch(4), labels=batch(4)).loss, torch.tensor(4 * 5)
    parts = [model(batch(4)[i : i + 2], labels=batch(4)[i : i + 2], num_items_in_batch=items).loss for i in (0, 2)]
    torch.testing.assert_close(sum(parts), whole, rtol=0, atol=1e-6)


def test_training_goes_on_around_the_same_examples(tmp_path: Path) -> None:
    model = attach("llama", CPTConfig(**EXAMPLES), 0.001)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build("llama"), tmp_path, is_trainable=True).prompt_encoder["default"]
    assert torch.equal(again.vectors, model.prompt_encoder["default"].vectors)
    assert [name for name, p in again.named_parameters() if p.requires_grad] == ["delta_embedding.weight"]
    (tmp_path / "prompt_encoder.safetensors").unlink()
    (tmp_path / "SHA256SUMS").unlink()
    with pytest.raises(CheckpointError, match="training cannot continue"):
        PeftModel.from_pretrained(build("llama"), tmp_path, is_trainable=True)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"task_type": "SEQ_CLS"}, "for task_type='CAUSAL_LM'"),
        ({"cpt_token_ids": [1, 2], "cpt_mask": [1]}, r"must be equally long; got \[2, 1, 2\]"),
        ({"opt_weighted_loss_type": "linear"}, "must be one of 'none', 'decay'"),
    ],
)
def test_configurations_that_cannot_be(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        CPTConfig(**options)


@pytest.mark.parametrize("field", ["cpt_token_ids", "cpt_mask", "cpt_tokens_type_mask"])
def test_what_is_no_list_of_integers_is_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=rf"{field} must be a list of integers"):
        CPTConfig(**{field: False})
