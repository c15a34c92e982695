"""Whatever terms a model adds to next-token cross entropy, it is trained, searched and evaluated with them."""

import logging
from typing import Any

import pytest
import torch
from quiet_training import quiet_arguments
from tiny_models import tiny
from torch import Tensor, nn
from transformers import BambaConfig, BambaForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedConfig
from transformers.models.auto import modeling_auto as auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from peftcore import LoraConfig, TrainingError, get_peft_model
from peftcore.train import AdapterTrainer, RightPaddingCollator, find_ranks
from peftcore.train.losses import token_losses
from peftcore.train.model_loss import ModelLossCheck, has_causal_loss

FLAGS: dict[str, Any] = {
    "output_router_logits": True,
    "router_aux_loss_coef": 0.5,
    "aux_loss_coef": 0.5,
    "z_loss_coefficient": 0.1,
}
"""Every field by which a causal model of transformers adds terms to its loss, and a value that shows."""
TINY = 3_000_000
"""Parameters (count) of the largest model that is computed here."""
TYPES = sorted(
    {*auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    & set(CONFIG_MAPPING_NAMES)
)


def switch_on(config: PreTrainedConfig) -> None:
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            switch_on(value)
    for name, value in FLAGS.items():
        if hasattr(config, name):
            setattr(config, name, value)


def computed_tiny(model_type: str) -> Any:
    """A model of this type with every flag on; None where it cannot be built or computed tiny, or has another loss."""
    try:
        sketch: Any = tiny(model_type)
    except Exception:  # whatever a configuration's or a model's own checks raise
        return None
    if sum(p.numel() for p in sketch.parameters()) > TINY or not has_causal_loss(sketch):
        return None
    switch_on(sketch.config)
    torch.manual_seed(0)
    model = type(sketch)(sketch.config).eval()
    try:
        with torch.no_grad():
            model(**batch())
    except Exception:  # it needs images, a GPU, or sizes that shrinking has broken
        return None
    return model


def batch(**options: Any) -> dict[str, Tensor]:
    ids = torch.randint(5, 100, (2, 16), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone(), **options}


# -- every type ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "letters",
    [
        "m",
        *(pytest.param(some, marks=pytest.mark.slow) for some in ("abc", "def", "g", "hijkl", "nop", "qrstuvwxyz")),
    ],
)
def test_tokens_alone_are_trained_only_where_the_own_loss_with_every_flag_on_is_no_more(letters: str) -> None:
    used: dict[str, bool] = {}
    right: dict[str, bool] = {}
    for model_type in TYPES:
        model = computed_tiny(model_type) if model_type[0] in letters else None
        if model is None:
            continue
        inputs, labels = parts(batch())
        with torch.no_grad():
            own = model(**inputs, labels=labels).loss
            tokens = token_losses(model, inputs, labels)[0].mean()
        routes = getattr(model.config, "output_router_logits", False)  # then the own loss is used, whatever it is
        used[model_type] = not routes and ModelLossCheck().agrees(model, inputs, labels)
        right[model_type] = not routes and bool((own - tokens).abs() < 1e-4)
        assert has_causal_loss(model) == (not routes)
    assert len(used) >= 15
    assert used == right


# -- trainer and search ----------------------------------------------------------------------------------------


def bamba(**options: Any) -> Any:
    torch.manual_seed(0)
    mamba = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2}
    sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = BambaConfig(
        **sizes, **mamba, num_hidden_layers=2, num_key_value_heads=2, attn_layer_indices=[1], **options, pad_token_id=0
    )
    return BambaForCausalLM(config)


def adapted(model: Any) -> Any:
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))


def trainer(model: Any, folder: Any, **options: Any) -> AdapterTrainer:
    rows = [{name: value[row] for name, value in batch().items() if name != "attention_mask"} for row in (0, 1)]
    return AdapterTrainer(
        model=model,
        args=quiet_arguments(folder, max_steps=1, per_device_eval_batch_size=2, **options),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=RightPaddingCollator(0),
    )


def test_a_z_loss_is_trained_and_evaluated_and_said_once(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = adapted(bamba(z_loss_coefficient=0.1))
    made = trainer(model, tmp_path)
    with caplog.at_level(logging.WARNING, logger="peftcore.train.losses"):
        for training in (True, False, True):
            model.train(training)
            own = model(**batch()).loss
            assert own > token_losses(model, *parts(batch()))[0].mean() + 1
            torch.testing.assert_close(made.compute_loss(model, batch()), own)
        assert made.evaluate()["eval_loss"] == pytest.approx(own.item(), rel=1e-5)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "BambaForCausalLM: the model's own loss is" in caplog.text


def test_the_first_thing_may_be_an_evaluation(tmp_path: Any) -> None:
    model = adapted(bamba(z_loss_coefficient=0.1)).eval()
    made = trainer(model, tmp_path, prediction_loss_only=True)
    assert made.evaluate()["eval_loss"] == pytest.approx(model(**batch()).loss.item(), rel=1e-5)


def test_weights_of_rows_are_refused_where_the_loss_has_further_terms(tmp_path: Any) -> None:
    model = adapted(bamba(z_loss_coefficient=0.1))
    with pytest.raises(TrainingError, match="no additional loss terms"):
        trainer(model, tmp_path).compute_loss(model, batch(weight=torch.ones(2, 1)))


def test_ranks_are_searched_by_the_models_own_loss() -> None:
    model = bamba(z_loss_coefficient=0.1).eval()
    with torch.no_grad():
        own = model(**batch()).loss.item()
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    found = find_ranks(model, config, [batch()], [batch()], progress=False)
    assert found.loss_before == pytest.approx(own, rel=1e-5)


def parts(inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    labels = inputs.pop("labels")
    return inputs, labels


class TwoLosses(LlamaForCausalLM):
    """Adds a loss for an input that not every batch has."""

    def forward(self, *args: Any, image_labels: Tensor | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        output = super().forward(*args, **kwargs)
        if image_labels is not None and output.loss is not None:
            output.loss = output.loss + image_labels.float().mean()
        return output


def two_losses() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    return TwoLosses(LlamaConfig(**sizes, num_hidden_layers=1))


def test_each_combination_of_inputs_is_compared() -> None:
    model, check = two_losses(), ModelLossCheck()
    inputs, labels = parts(batch())
    assert check.agrees(model, inputs, labels)
    assert not check.agrees(model, {**inputs, "image_labels": torch.ones(2)}, labels)
    assert check.differs and not check.agrees(model, inputs, labels)


def test_comparing_draws_no_random_numbers_and_needs_no_label() -> None:
    torch.manual_seed(0)
    model, check = LlamaForCausalLM(two_losses().config).train(), ModelLossCheck()
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    state = torch.get_rng_state()
    inputs, labels = parts(batch())
    assert check.agrees(model, inputs, torch.full_like(labels, -100))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("labelled", [slice(0, 3), slice(295, 300), slice(100, 250)])
def test_a_few_positions_of_one_row_are_enough(labelled: slice) -> None:
    seen: list[tuple[int, ...]] = []

    class Seen(LlamaForCausalLM):
        def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:  # type: ignore[override]
            seen.append(tuple(input_ids.shape))
            output = super().forward(input_ids, **kwargs)
            output.loss = output.loss + 0.01
            return output

    ids = torch.randint(5, 100, (4, 300), generator=torch.Generator().manual_seed(1))
    labels = torch.full_like(ids, -100)
    labels[:, labelled] = ids[:, labelled]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert not ModelLossCheck().agrees(Seen(two_losses().config), inputs, labels)
    assert seen == [(1, 64)]


def test_a_loss_that_does_not_fit_into_memory_is_not_compared_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    class Large(LlamaForCausalLM):
        def forward(self, *args: Any, labels: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
            raise torch.OutOfMemoryError

    model: nn.Module = Large(two_losses().config)
    assert ModelLossCheck().agrees(model, *parts(batch()))
    assert "does not fit into memory" in caplog.text
