"""AdapterFusion: trained attention over adapters."""

from pathlib import Path
from typing import Any

import pytest
import torch
from routed_experts import NAMES, X, adapted
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from peftcore import IA3Config, LoraConfig
from peftcore.composition import Average
from peftcore.errors import AdapterNameError, CheckpointError, RoutingError
from peftcore.routing import Fusion


def moved(fusion: Fusion) -> Fusion:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return fusion


def by_hand(model: Any, fusion: Fusion, path: str, x: Tensor) -> Tensor:
    """f(x) + Σ softmax(Q x · K Δᵢ / √w)ᵢ Δᵢ from the dense ΔW."""
    layer, query, key = model[int(path)], fusion.queries[path], fusion.keys[path]
    changes = torch.stack([x @ layer.adapters[name].delta_weight().T for name in NAMES if name in layer.adapters], -2)
    scores = ((x @ query.T).unsqueeze(-2) * (changes @ key.T)).sum(-1) / fusion.width**0.5
    return layer.base_layer(x) + (F.softmax(scores, -1).unsqueeze(-1) * changes).sum(-2)


def test_it_starts_as_the_average() -> None:
    model = adapted()
    found, expected = (model(X, adapter_names=one) for one in (Fusion(model, ["a", "b"]).gate, Average("a", "b")))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_it_is_the_attention_it_says() -> None:
    model = adapted()
    fusion = moved(Fusion(model, NAMES, width=4))
    expected = by_hand(model, fusion, "2", torch.tanh(by_hand(model, fusion, "0", X)))
    torch.testing.assert_close(model(X, adapter_names=fusion.gate), expected, atol=1e-10, rtol=0)
    rows = [fusion.gate, "a", None, fusion.gate, "b", "c"]
    with torch.no_grad():  # the stacked products
        torch.testing.assert_close(model(X, adapter_names=fusion.gate), expected, atol=1e-10, rtol=0)
        mixed = model(X, adapter_names=rows)
        for row, one in enumerate(rows):
            alone = model(X[row : row + 1], adapter_names=one or "__base__")
            torch.testing.assert_close(mixed[row : row + 1], alone, atol=1e-10, rtol=0)


def test_it_learns_which_adapter_to_weigh_for_which_token() -> None:
    """The target is "a" where a token's first feature is positive and "b" elsewhere: no fixed mixture can be that."""
    model = adapted()
    torch.manual_seed(2)
    x = torch.randn(400, 12, dtype=torch.float64)
    with torch.no_grad():
        target = torch.where(x[:, :1] > 0, model(x, adapter_names="a"), model(x, adapter_names="b"))
    fusion = Fusion(model, ["a", "b"])
    optimizer = torch.optim.Adam(fusion.parameters(), lr=0.03)
    losses = []
    for _ in range(300):
        loss = F.mse_loss(model(x, adapter_names=fusion.gate), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    alone = [F.mse_loss(model(x, adapter_names=name), target).item() for name in ("a", "b")]
    assert losses[0] < min(alone) and losses[-1] < 0.6 * losses[0] < 0.4 * min(alone)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_dora_answers_with_its_gain() -> None:
    model = adapted(bias=False, use_dora=True)  # with a bias DoRA is more than two factors and a gain
    fusion = moved(Fusion(model, ["a", "b"]))
    x = X[0]
    weights = fusion("2", dict(model[2].adapters._modules), x[:, :10])
    assert weights.shape == (5, 3) and torch.allclose(weights.sum(-1), torch.ones(5, dtype=torch.float64))


def test_its_file(tmp_path: Path) -> None:
    model = adapted()
    fusion, path = moved(Fusion(model, NAMES, width=4)), tmp_path / "fusion.safetensors"
    fusion.save(path)
    again = Fusion.load(model, path)
    assert again.members == ("a", "b", "c") and again.width == 4
    assert torch.equal(model(X, adapter_names=fusion.gate), model(X, adapter_names=again.gate))
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    with pytest.raises(CheckpointError, match="another copy"):
        Fusion.load(model, path)
    path.write_bytes(whole)
    model.delete_adapter("c")
    with pytest.raises(AdapterNameError, match="Adapter c does"):
        Fusion.load(model, path)
    save_file({"queries.0": torch.ones(4, 12)}, path, metadata={"members": '["a", "b"]', "width": "4"})
    with pytest.raises(CheckpointError, match=r"other layers: keys\.0"):
        Fusion.load(model, path)


def test_bad_input_is_named() -> None:
    model = adapted()
    with pytest.raises(RoutingError, match="two adapters or more"):
        Fusion(model, ["a"])
    with pytest.raises(AdapterNameError, match="Adapter z does"):
        Fusion(model, ["a", "z"])
    model.add_adapter("ia3", IA3Config(target_modules=["0"], feedforward_modules=[], inference_mode=True))
    with pytest.raises(RoutingError, match="low-rank adapters; IA3 at 0"):
        Fusion(model, ["a", "ia3"])
    fusion = Fusion(model, ["a", "c"])
    model.add_adapter("d", LoraConfig(r=2, target_modules=["2"]))
    renamed = fusion.gate.renamed({"c": "d"})
    assert model(X, adapter_names=renamed).shape == (6, 5, 8)
