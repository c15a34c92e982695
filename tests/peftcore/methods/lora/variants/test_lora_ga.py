"""LoRA-GA: the first step follows the gradient of the weight."""

import pytest
import torch
from observed_lora import batches, llama, lora
from torch import nn

from peftcore.injection.adapter_set import adapter_set
from peftcore.injection.start_from_data import initialize_from_data


def test_lora_ga_first_step_follows_the_gradient_of_the_weight() -> None:
    model = lora("lora_ga", target_modules=["q_proj"], r=8, lora_ga_config={"direction": "ArB2r", "scale": "unit"})
    data = batches(2)
    initialize_from_data(model, data, progress=False)
    plain = llama()
    for batch in data:
        plain(**batch).loss.backward()
    path, adapter = next(iter(adapter_set(model).adapters("default").items()))
    gradient = plain.get_submodule(path).weight.grad
    u, _, vh = torch.linalg.svd(gradient)
    torch.testing.assert_close((adapter.lora_A_weight @ vh[:8].T).abs(), torch.eye(8), rtol=1e-2, atol=1e-2)
    directions = nn.functional.normalize(adapter.lora_B_weight, dim=0)
    torch.testing.assert_close((directions.T @ u[:, 8:16]).abs(), torch.eye(8), rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("scale", ["stable", "gd_scale", "unit"])
def test_lora_ga_does_not_depend_on_how_often_a_batch_is_seen(scale: str) -> None:
    products = []
    for count in (1, 8, 64):
        torch.manual_seed(0)
        model = lora("lora_ga", target_modules=["q_proj"], lora_ga_config={"scale": scale})
        initialize_from_data(model, batches(1) * count, progress=False)
        products.append([a.lora_B_weight @ a.lora_A_weight for a in adapter_set(model).adapters("default").values()])
    for other in products[1:]:
        for ours, theirs in zip(products[0], other, strict=True):
            assert (theirs - ours).norm() < 1e-3 * ours.norm()
