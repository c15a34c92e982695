from typing import Any

import pytest
import torch
from tiny_models import tiny
from torch import nn
from transformers import BertConfig, BertModel, Gemma2Config, GraniteConfig, LlamaConfig, LlamaForCausalLM

from peftcore.detection import detect
from peftcore.detection.head import LogitTransform, logit_transforms, output_head


class _Model(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config


def product() -> torch.Tensor:
    return 40 * torch.randn(3, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_a_transform_scales_and_then_caps() -> None:
    u = product()
    torch.testing.assert_close(LogitTransform(0.5, 30.0)(u), 30 * torch.tanh(0.5 * u / 30))
    assert LogitTransform()(u) is u


def test_the_likeliest_reading_of_a_configuration_comes_first() -> None:
    granite = logit_transforms(_Model(GraniteConfig(logits_scaling=8.0)))
    assert granite[0] == LogitTransform(1 / 8) and LogitTransform(8.0) in granite and LogitTransform() in granite
    gemma = logit_transforms(_Model(Gemma2Config(final_logit_softcapping=30.0)))
    assert gemma[0] == LogitTransform(softcap=30.0) and LogitTransform() in gemma
    assert logit_transforms(_Model(LlamaConfig())) == logit_transforms(nn.Linear(2, 2)) == (LogitTransform(),)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(0.0625), LogitTransform(1.3, 30.0)])
def test_a_transform_explains_what_it_made_and_nothing_else(dtype: torch.dtype, transform: LogitTransform) -> None:
    u = product().to(dtype)
    logits = transform(u)
    assert transform.explains(u, logits)
    assert transform.explains(u, transform(u.float()))  # widened before instead of after
    assert not transform.explains(u, logits * 1.02)
    assert not transform.explains(u, logits[:, :-1])
    others = {LogitTransform(), LogitTransform(0.0625), LogitTransform(1.3, 30.0)} - {transform}
    assert not any(other.explains(u, logits) for other in others)


def test_one_logit_that_is_masked_is_not_explained() -> None:
    logits = product()
    logits[1, 4] = torch.finfo(logits.dtype).min
    assert not LogitTransform().explains(product(), logits)


def test_the_head_is_what_the_model_names() -> None:
    config = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(config)
    assert output_head(model) is model.lm_head
    bert = BertModel(
        BertConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    assert output_head(bert) is None and output_head(nn.Linear(2, 2)) is None


class Classifier(nn.Module):
    """Two blocks of one MLP each, and a layer after them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16)) for _ in range(2))
        self.answer = nn.Linear(16, 7)


def test_a_classifier_after_the_blocks_is_the_head() -> None:
    assert detect(Classifier()).target_modules["answer"].role == "head"


def test_layers_that_feed_the_base_model_are_no_heads() -> None:
    roles = {name: info.role for name, info in detect(tiny("pi0")).target_modules.items()}
    assert (roles["action_in_proj"], roles["action_out_proj"]) == ("unknown", "head")
