"""CorDA: the factors are singular vectors of the weight times the covariance."""

import pytest
import torch
from observed_lora import batches, lora

from peftcore.injection.adapter_set import adapter_set
from peftcore.injection.start_from_data import initialize_from_data


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda_decomposes_the_weight_as_the_data_sees_it(method: str) -> None:
    model = lora("corda", target_modules=["q_proj"], corda_config={"corda_method": method})
    path, adapter = next(iter(adapter_set(model).adapters("default").items()))
    seen: list[torch.Tensor] = []
    handle = adapter.base.layer.register_forward_hook(lambda _m, x, _y: seen.append(x[0].detach()))
    initialize_from_data(model, batches(), progress=False)
    handle.remove()
    x = torch.cat([rows.reshape(-1, 16) for rows in seen])
    part = adapter.scaling * adapter.lora_B_weight @ adapter.lora_A_weight
    weight = adapter.base.read()
    share = (x @ part.T).norm() / (x @ weight.T).norm()
    assert share > 0.7 if method == "ipm" else share < 0.3, path
