"""What the FRoD paper says: a basis for all layers of one role, trained lengths and a sparse trained rotation."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from method_example import Example, randomise
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peftcore import ConfigError, PeftModel, get_peft_model
from peftcore.injection.adapter_set import adapter_set
from peftcore.methods.frod import FrodConfig, role

QUIET: dict[str, Any] = {"progressbar": False}
EXAMPLE = Example(
    FrodConfig,
    options={"sparse_rate": 0.2, **QUIET},
    theirs="FrodConfig",
    parity={
        "plain": {"sparse_rate": 0.05, **QUIET},
        "computed again": {"save_projection": False, "projection_prng_key": 42, **QUIET},
        "biases": {"bias": "frod_only", "init_weights": False, "regularization_alpha": 0.1, **QUIET},
    },
    spread=0.1,
)
X = torch.linspace(-1, 1, 18, dtype=torch.float64).view(3, 6)


class Blocks(nn.Module):
    """Blocks of two layers; those called "down" have more inputs than all their weights have rows."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(6, 20), "down": nn.Linear(20, 6)}) for _ in range(count)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = block["down"](block["up"](x).tanh())  # type: ignore[index]
        return x


def net(seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    base = Blocks().double()
    return get_peft_model(
        base, FrodConfig(**{"target_modules": ["up", "down"], "sparse_rate": 0.1, **QUIET, **options})
    )


def layers(model: Any) -> dict[str, Any]:
    return dict(adapter_set(model).adapters("default"))


def sparse(adapter: Any) -> Tensor:
    """S, from its places and values."""
    rows, columns = adapter.shared.get_buffer(f"frod_s_indices.{adapter.role}")
    s = torch.zeros(len(adapter.frod_lambda_l), len(adapter.frod_lambda_l), dtype=torch.float64)
    s[rows, columns] = adapter.frod_lambda_s_values.detach()
    return s


def test_the_papers_formula() -> None:
    model = net()
    randomise(model, 0.3)
    for adapter in layers(model).values():
        v = adapter.shared.get_buffer(f"frod_V.{adapter.role}")
        weight = adapter.frod_U @ (sparse(adapter) + adapter.frod_lambda_l.diag()) @ v.T
        torch.testing.assert_close(adapter.base.read() + adapter.delta_weight(), weight, rtol=1e-6, atol=1e-6)


def test_the_decomposition_is_the_weight_and_has_columns_of_length_one() -> None:
    for adapter in layers(net()).values():
        v = adapter.shared.get_buffer(f"frod_V.{adapter.role}")
        rebuilt = adapter.frod_U @ adapter.frod_lambda_l.diag() @ v.T
        torch.testing.assert_close(rebuilt, adapter.base.read(), rtol=1e-6, atol=1e-6)
        assert torch.equal(adapter.frod_lambda_l, adapter.start_lambda_l)
        torch.testing.assert_close(adapter.frod_U.norm(dim=0), torch.ones(adapter.base.in_features).double())


def test_layers_of_one_role_share_a_basis_and_places_off_the_diagonal() -> None:
    model = net(sparse_rate=0.1)
    shared = next(iter(layers(model).values())).shared
    assert {adapter.role for adapter in layers(model).values()} == {"up", "down"}
    for name, size in (("up", 6), ("down", 20)):
        assert shared.get_buffer(f"frod_V.{name}").shape == (size, size)
        rows, columns = shared.get_buffer(f"frod_s_indices.{name}")
        assert (rows != columns).all() and len({*zip(rows.tolist(), columns.tolist(), strict=True)}) == len(rows)
        assert len(rows) == int(size * size * 0.1)
    assert model.get_nb_trainable_parameters()[0] == 3 * (6 + 3) + 3 * (20 + 40)


def test_the_basis_makes_the_gram_matrices_of_all_layers_diagonal_if_they_agree() -> None:
    """Layers whose weights have the same right singular vectors get these, up to their lengths."""
    torch.manual_seed(0)
    base = Blocks().double()
    right = torch.linalg.qr(torch.randn(6, 6).double())[0]
    for block in base.layers:
        left = torch.linalg.qr(torch.randn(20, 6).double())[0]
        block["up"].weight.data = left @ torch.rand(6).double().add(0.5).diag() @ right.T  # type: ignore[index]
    model = get_peft_model(base, FrodConfig(target_modules=["up"], regularization_alpha=1e-6, **QUIET))
    for adapter in layers(model).values():
        gram = adapter.frod_U.T @ adapter.frod_U
        torch.testing.assert_close(gram, torch.eye(6).double(), rtol=0, atol=1e-2)


def test_a_rate_of_zero_trains_lengths_only_and_a_tiny_one_trains_one_entry() -> None:
    assert layers(net(sparse_rate=0.0))["layers.0.up"].frod_lambda_s_values.shape == (0,)
    assert layers(net(sparse_rate=1e-6))["layers.0.up"].frod_lambda_s_values.shape == (1,)
    assert layers(net(sparse_rate=1.0))["layers.0.up"].frod_lambda_s_values.shape == (30,)


@pytest.mark.parametrize("save", [True, False])
def test_a_directory_with_and_without_bases(save: bool, tmp_path: Path) -> None:
    model = net(save_projection=save, projection_prng_key=11)
    randomise(model, 0.3)
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    names = {f"base_model.frod_{name}.{role}" for name in ("V", "s_indices", "s_size") for role in ("up", "down")}
    assert (names <= keys) == save and len(keys) == 12 + 6 * save
    expected = model(X)
    assert torch.equal(PeftModel.from_pretrained(model.unload(), tmp_path)(X), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_base_of_16_bits_starts_exactly_and_comes_back_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, x = Blocks().to(dtype), X.to(dtype)
    before = base(x)
    model = get_peft_model(base, FrodConfig(target_modules=["up", "down"], sparse_rate=0.1, **QUIET))
    assert torch.equal(model(x), before)
    randomise(model, 0.1)
    model.save_pretrained(tmp_path)
    expected = model(x)
    assert torch.equal(PeftModel.from_pretrained(model.unload(), tmp_path)(x), expected)


def test_u_belongs_to_the_basis_that_is_read(tmp_path: Path) -> None:
    """Another machine may compute eigenvectors of other signs; the directory's own are used."""
    model = net()
    randomise(model, 0.3)
    model.save_pretrained(tmp_path)
    file, key = tmp_path / "adapter_model.safetensors", "base_model.frod_V.up"
    tensors = load_file(file)
    tensors[key] *= torch.tensor([1, -1, 1, 1, -1, 1])
    (tmp_path / "SHA256SUMS").unlink()
    save_file(tensors, file)
    for adapter in layers(PeftModel.from_pretrained(model.unload(), tmp_path)).values():
        rebuilt = adapter.frod_U @ adapter.start_lambda_l.diag() @ adapter.shared.get_buffer(f"frod_V.{adapter.role}").T
        torch.testing.assert_close(rebuilt, adapter.base.read(), rtol=1e-6, atol=1e-6)


def test_layers_that_do_not_use_all_their_inputs() -> None:
    base = Blocks(1).double()
    with torch.no_grad():
        base.layers[0]["up"].weight[:, 2:4] = 0  # type: ignore[index]
    before = base(X)
    model = get_peft_model(base, FrodConfig(target_modules=["up"], **QUIET))
    torch.testing.assert_close(model(X), before, rtol=1e-12, atol=1e-12)
    assert layers(model)["layers.0.up"].frod_U.isfinite().all()


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("lin0", "lin0"),
        ("model.layers.3.self_attn.q_proj", "self_attn_q_proj"),
        ("transformer.h.0.mlp.c_fc", "mlp_c_fc"),
        ("layers.0.up", "up"),
        ("bert.encoder.layer.1.attention.output.dense", "attention_output"),
        ("bert.encoder.layer.1.output.dense", "output_dense"),
    ],
)
def test_roles(path: str, expected: str) -> None:
    assert role(path) == expected


def test_the_progress_bar_is_shown_if_asked(capsys: pytest.CaptureFixture[str]) -> None:
    net()
    assert not capsys.readouterr().err
    net(progressbar=True)
    assert "FRoD: bases" in capsys.readouterr().err


def test_layers_of_one_role_need_equally_many_inputs() -> None:
    base = nn.ModuleDict({"0": nn.ModuleDict({"a": nn.Linear(4, 3)}), "1": nn.ModuleDict({"a": nn.Linear(5, 3)})})
    with pytest.raises(ConfigError, match=r"those of 'a' have different sizes: \[4, 5\] inputs"):
        get_peft_model(base, FrodConfig(target_modules=["a"], **QUIET))


def test_offloading_says_that_it_does_nothing() -> None:
    with pytest.warns(UserWarning, match="runtime_offload_base_weight has no effect"):
        FrodConfig(runtime_offload_base_weight=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparse_rate": -0.1}, "sparse_rate must be from 0 to 1; got -0.1"),
        ({"regularization_alpha": 0.0}, "regularization_alpha must be above 0; got 0.0"),
        ({"frod_dropout": 1.0}, "below 1; got 1.0"),
        ({"bias": "lora_only"}, "'frod_only'; got 'lora_only'"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FrodConfig(**options)


def test_the_basis_does_not_depend_on_pytorchs_default_type() -> None:
    base = Blocks()
    config = FrodConfig(target_modules=["up"], sparse_rate=0.1, **QUIET)
    expected = layers(get_peft_model(copy.deepcopy(base), config))["layers.0.up"].shared.frod_V.state_dict()
    torch.set_default_dtype(torch.float64)
    try:
        found = layers(get_peft_model(base, config))["layers.0.up"].shared.frod_V.state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
