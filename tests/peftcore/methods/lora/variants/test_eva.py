"""EVA: principal components of the inputs, and ranks where they explain most."""

from typing import Any

import pytest
import torch
from observed_lora import TOKENS, batches, llama, lora

from peftcore import PeftModel
from peftcore.errors import ConfigError
from peftcore.injection.adapter_set import adapter_set
from peftcore.injection.start_from_data import initialize_from_data
from peftcore.methods.lora.variants.eva import PrincipalComponents

pytestmark = pytest.mark.filterwarnings("ignore:.init_lora_weights. is:UserWarning")  # EVA or CorDA by defaults


def test_principal_components_are_those_of_all_rows_at_once() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 8) @ torch.diag(torch.arange(8, 0, -1.0)) + 3
    pca = PrincipalComponents(8)
    for part in x.split(40):
        pca.add(part, tau=0.99)
    _, s, v = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    torch.testing.assert_close(pca.values, s, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close((pca.components @ v.T).abs(), torch.eye(8), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(pca.explained().sum(), torch.tensor(1.0))
    assert pca.rows == 200


def test_eva_spends_the_ranks_where_they_explain_most() -> None:
    model = lora("eva")
    base = model(TOKENS).logits
    before = {path: a.r for path, a in adapter_set(model).adapters("default").items()}
    initialize_from_data(model, batches(), progress=False)
    after = dict(adapter_set(model).adapters("default"))
    assert sum(a.r for a in after.values()) == sum(before.values())
    assert {a.r for a in after.values()} != {4} and max(a.r for a in after.values()) <= 8
    torch.testing.assert_close(model(TOKENS).logits, base)  # B is zero
    for adapter in after.values():
        gram = adapter.lora_A_weight @ adapter.lora_A_weight.T
        torch.testing.assert_close(gram, torch.eye(adapter.r), rtol=1e-4, atol=1e-4)
        assert adapter.scaling == pytest.approx(2.0)  # α follows r
    assert model.active_adapters == ["default"] and all(a.lora_A_weight.requires_grad for a in after.values())


@pytest.mark.parametrize("adjust", [True, False])
@pytest.mark.parametrize("use_rslora, scaling", [(False, 8 / 4), (True, 8 / 4**0.5)])
def test_eva_keeps_the_scale_of_layers_whose_rank_changes(use_rslora: bool, scaling: float, adjust: bool) -> None:
    model = lora("eva", use_rslora=use_rslora, eva_config={"adjust_scaling_factors": adjust})
    initialize_from_data(model, batches(), progress=False)
    layers = adapter_set(model).adapters("default").values()
    assert {a.r for a in layers} != {4}
    for a in layers:
        assert a.scaling == pytest.approx(scaling if adjust else 8 / (a.r**0.5 if use_rslora else a.r))


def test_eva_says_that_every_token_is_masked() -> None:
    data = batches()
    for batch in data:
        batch["labels"][:] = -100
    model = lora("eva")
    before = adapter_set(model).configs["default"]
    with pytest.raises(ConfigError, match=r"no token, .*use_label_mask=False"):
        initialize_from_data(model, data, progress=False)
    assert adapter_set(model).configs["default"] is before


def test_eva_leaves_masked_rows_out(tmp_path: Any) -> None:
    data = batches()
    for batch in data:
        batch["labels"][:, :-1] = -100
        batch["attention_mask"][:] = 1
    model = lora("eva", eva_config={"rho": 1.0})
    initialize_from_data(model, data, progress=False)
    assert {a.r for a in adapter_set(model).adapters("default").values()} == {4}
    other = lora("eva", eva_config={"rho": 1.0, "use_label_mask": False})
    initialize_from_data(other, data, progress=False)
    ours, theirs = (next(iter(adapter_set(m).adapters("default").values())).lora_A_weight for m in (model, other))
    assert not torch.allclose(ours.abs(), theirs.abs(), atol=1e-2)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(llama(), tmp_path)(TOKENS).logits, model(TOKENS).logits)
