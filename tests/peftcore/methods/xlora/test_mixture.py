"""X-LoRA's classifier and its weights: where the weights come from, how they are chosen, what trains and is saved."""

import copy
import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from layer_parity import peft
from torch import nn
from xlora_models import llama, lora_alone, mixed, mixture, tokens

from peftcore import ConfigError, PeftModel, get_peft_model
from peftcore.methods.xlora import XLoraConfig
from peftcore.methods.xlora.mixture import Classifier


def test_the_weights_come_from_a_pass_over_the_base(loras: dict[str, str]) -> None:
    model = mixed(loras)
    model(tokens(), labels=tokens())
    hidden = llama()(tokens(), output_hidden_states=True).hidden_states[-1]
    classifier = mixture(model).internal_xlora_classifier
    torch.testing.assert_close(mixture(model).scalings, classifier(hidden))


def test_top_k_and_its_softmax(loras: dict[str, str]) -> None:
    shared = mixture(mixed(loras, enable_softmax=False, top_k_lora=2, enable_softmax_topk=True))
    s = torch.tensor([[[[0.5, 2.0, 1.0]]]])
    expected = torch.tensor([0.0, *torch.tensor([2.0, 1.0]).softmax(0)])
    torch.testing.assert_close(shared.chosen(s)[0, 0, 0], expected)
    shared.config = dataclasses.replace(shared.config, enable_softmax_topk=False)
    torch.testing.assert_close(shared.chosen(s)[0, 0, 0], torch.tensor([0.0, 2.0, 1.0]))


def test_only_the_classifier_trains_and_with_the_option_the_loras_too(loras: dict[str, str]) -> None:
    model = mixed(loras, layerwise_scalings=True).train()
    model(tokens(), labels=tokens()).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("internal_xlora_classifier" in name for name in trained)
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
    model.set_requires_grad("default", True)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained

    model = mixed(loras, use_trainable_adapters=True)
    model(tokens(), labels=tokens()).loss.backward()
    loras_too = [p for name, p in model.named_parameters() if p.requires_grad and "classifier" not in name]
    assert len(loras_too) == 2 * sum((4, 3, 2)) and all(p.grad is not None for p in loras_too)


def test_copies_after_a_forward_with_gradients(loras: dict[str, str]) -> None:
    model = mixed(loras)
    logits = model(tokens()).logits
    assert mixture(model).scalings is not None and mixture(model).scalings.requires_grad
    assert torch.equal(copy.deepcopy(model)(tokens()).logits, logits)
    assert pickle.loads(pickle.dumps(mixture(model))).scalings is None


def test_the_log_gathers_weights(loras: dict[str, str]) -> None:
    model = mixed(loras)
    assert model.get_latest_scalings() is None
    model(tokens())
    model.enable_scalings_logging()
    for call in (tokens(), tokens()[:1, :3], tokens()):
        model(call)
    model.disable_scalings_logging()
    model(tokens())
    log = model.get_scalings_log()
    assert [tuple(one.shape) for one in log] == [(2, 7, 7, 3), (1, 3, 7, 3), (2, 7, 7, 3)]
    assert {length: positions for length, (positions, _) in model.get_bucketed_scalings_log().items()} == {
        7: [0, 2],
        3: [1],
    }
    assert torch.equal(model.get_latest_scalings(), log[0]) and not log[0].requires_grad
    model.clear_scalings_log()
    assert model.base_model.get_scalings_log() == [] and len(log) == 3


@pytest.mark.filterwarnings("ignore")
def test_trained_loras_are_saved_here_and_read_by_peft(loras: dict[str, str], tmp_path: Path) -> None:
    model = mixed(loras, use_trainable_adapters=True)
    frozen = mixed(loras)(tokens()).logits
    expected = model(tokens()).logits
    assert (expected - frozen).abs().max() > 1e-2
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(llama(), tmp_path)(tokens()).logits, expected)
    there = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    rounding = 1e-5 * expected.abs().max().item()  # of float32, in sums of terms as large as the largest logit
    torch.testing.assert_close(there(input_ids=tokens()).logits, expected, rtol=0, atol=rounding)


def options(**given: Any) -> XLoraConfig:
    return XLoraConfig(hidden_size=8, adapters={"0": "unread", "1": "unread", "2": "unread"}, **given)


@pytest.mark.parametrize(("layerwise", "layers"), [(False, 1), (True, 5)])
def test_the_classifier_gives_one_weight_per_token_layer_and_lora(layerwise: bool, layers: int) -> None:
    classifier = Classifier(options(layerwise_scalings=layerwise), 5, 3)
    weights = classifier(torch.randn(2, 4, 8))
    assert weights.shape == (2, 4, layers, 3)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, layers))


def test_the_temperature_divides_the_logits() -> None:
    hot = Classifier(options(softmax_temperature=4.0), 1, 3)
    plain = Classifier(options(enable_softmax=False), 1, 3)
    plain.load_state_dict(hot.state_dict())
    x = torch.randn(2, 4, 8)
    torch.testing.assert_close(hot(x), (plain(x) / 4).softmax(-1))


def test_a_deeper_classifier_has_hidden_layers_of_the_given_size() -> None:
    classifier = Classifier(options(xlora_depth=3, xlora_size=16), 1, 3)
    linear = [layer for layer in classifier.layers if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == [(8, 16), (16, 16), (16, 3)]
    assert sum(isinstance(layer, nn.Dropout) for layer in classifier.layers) == 2


def test_the_first_pass_may_run_with_the_loras_at_a_given_weight(loras: dict[str, str]) -> None:
    """With one LoRA at the weight 1, the classifier reads the hidden states of that LoRA alone."""
    one = {"0": loras["0"]}
    model = mixed(one, scaling_pass_value=1.0, layerwise_scalings=True)
    model(tokens())
    hidden = lora_alone(loras, 0)(tokens(), output_hidden_states=True).hidden_states[-1]
    assert not torch.allclose(hidden, llama()(tokens(), output_hidden_states=True).hidden_states[-1], atol=1e-3)
    torch.testing.assert_close(mixture(model).first_pass(model, {"input_ids": tokens()}), hidden, rtol=1e-5, atol=1e-5)
    assert not mixture(model).passing


def test_hidden_states_of_another_size_are_refused(loras: dict[str, str]) -> None:
    wrong = get_peft_model(llama(), XLoraConfig(hidden_size=16, adapters=loras))
    with pytest.raises(ConfigError, match=r"hidden_size=16, and .* returns hidden states of size 32"):
        wrong(tokens())
