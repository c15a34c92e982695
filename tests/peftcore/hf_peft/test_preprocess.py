"""CorDA and LoRA-GA with the data before get_peft_model: the same starts as HF PEFT's functions give."""

import copy
import inspect
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import config as peft_config
from peft.tuners.lora import corda as corda_of_peft
from peft.tuners.lora import loraga as loraga_of_peft
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peftcore import CheckpointError, ConfigError, LoraConfig, LoraGAConfig, get_peft_model, initialize_from_data
from peftcore.hf_peft.options import CordaConfig
from peftcore.hf_peft.preprocess import estimate_gradients, preprocess_corda, preprocess_loraga

X = torch.randn(40, 12, generator=torch.Generator().manual_seed(3))
TARGETS = ["first", "second"]


class Net(nn.Module):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.first = nn.Linear(12, 10)
        self.second = Conv1D(6, 10)
        self.unused = nn.Linear(12, 12)
        self.table = nn.Embedding(5, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


def corda(library: Any = None, **options: Any) -> Any:
    if library is peft:
        own = peft_config.CordaConfig(**options)
        return peft.LoraConfig(init_lora_weights="corda", target_modules=["first"], r=3, corda_config=own)
    return LoraConfig(init_lora_weights="corda", target_modules=TARGETS, r=3, corda_config=CordaConfig(**options))


def factors(model: Any) -> list[Tensor]:
    layers = [getattr(model.base_model.model, name) for name in TARGETS]
    return [p["default"].weight.detach() for layer in layers for p in (layer.lora_A, layer.lora_B)]


def assert_same_start(ours: Any, theirs: Any) -> None:
    for one, other in zip(factors(ours), factors(theirs), strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-3)
    torch.testing.assert_close(ours(X), theirs(X), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(preprocess_corda, corda_of_peft.preprocess_corda), (preprocess_loraga, loraga_of_peft.preprocess_loraga)],
)
def test_the_arguments_are_those_of_peft(ours: Any, theirs: Any) -> None:
    assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters)


# -- CorDA -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda_starts_as_in_peft(method: str) -> None:
    starts = []
    both: Any = ((None, preprocess_corda), (peft, corda_of_peft.preprocess_corda))
    for library, preprocess in both:
        model, config = Net(), corda(library, corda_method=method)
        preprocess(model, config, run_model=lambda model=model: [model(X), model(X[:7])])
        assert hasattr(model.first, "eigens")
        adapted: Any = peft.get_peft_model(model, config) if library else get_peft_model(model, config)
        layer = adapted.base_model.model.first
        starts.append((layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()))
        assert not hasattr(layer.base_layer, "eigens")
        torch.testing.assert_close(adapted(X), Net()(X), atol=1e-4, rtol=1e-3)
    for one, other in zip(*starts, strict=True):
        torch.testing.assert_close(one.abs(), other.abs(), atol=1e-4, rtol=1e-2)  # signs of singular vectors are free


def test_corda_before_is_corda_after_get_peft_model() -> None:
    before, after = Net(), get_peft_model(Net(), corda())
    preprocess_corda(before, corda(), lambda: before(X))
    initialize_from_data(after, [{"x": X}], progress=False)
    assert_same_start(get_peft_model(before, corda()), after)


def test_corda_from_its_files_needs_no_data(tmp_path: Path) -> None:
    cache, covariances = tmp_path / "a" / "cache.pt", tmp_path / "covariances.pt"
    model = Net()
    config = corda(cache_file=cache, covariance_file=covariances)
    preprocess_corda(model, config, lambda: model(X))
    expected = get_peft_model(model, config)
    for options in ({"cache_file": cache}, {"covariance_file": covariances}):
        model = Net()
        preprocess_corda(model, corda(**options))
        assert_same_start(get_peft_model(model, corda(**options)), expected)
    wider = corda(cache_file=cache)
    wider.r = 4
    with pytest.raises(CheckpointError, match=r"first.eigens.S_WC has the shape \[3\], and \[4\] fits"):
        preprocess_corda(Net(), wider)
    with pytest.raises(ConfigError, match="cache_file is an option of preprocess_corda only"):
        initialize_from_data(get_peft_model(Net(), corda(cache_file=cache)), [{"x": X}], progress=False)


def test_a_pickle_is_never_read(tmp_path: Path) -> None:
    file = tmp_path / "cache.pt"
    torch.save({"first.eigens.S_WC": X}, file)
    with pytest.raises(CheckpointError, match="is a pickle, which can run code"):
        preprocess_corda(Net(), corda(cache_file=file))
    with pytest.raises(CheckpointError, match="is a pickle, which can run code"):
        preprocess_loraga(Net(), loraga(), lambda: None, file)


def test_corda_may_watch_another_model_and_keep_what_it_found(capsys: pytest.CaptureFixture[str]) -> None:
    model = Net().train()
    watched = copy.deepcopy(model)
    config = corda(prune_temporary_fields=False, verbose=True)
    preprocess_corda(model, config, lambda: [watched(X), watched(X)], watched)
    assert "CorDA: 100%" in capsys.readouterr().err
    first: Any = model.first
    assert (first.sample_count, first.rank, first.corda_method) == (2, 3, "ipm")
    scaled = X / X.max()
    torch.testing.assert_close(first.covariance_matrix, scaled.T @ scaled)
    assert watched.training and not watched.first._forward_hooks
    half = Net().bfloat16()
    config = corda(use_float16_for_covariance=True, prune_temporary_fields=False)
    preprocess_corda(half, config, lambda: half(X.bfloat16()))
    assert half.first.covariance_matrix.dtype == torch.bfloat16  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"corda_config": None}, "no corda_config"),
        ({"target_modules": ["table"]}, "no linear layer, only embedding ones"),
        ({"target_modules": ["unused"]}, "never called the layer unused"),
        ({"r": 8}, "r=8 at second exceeds the weight's 6 singular vectors"),
        ({"corda_config": {"corda_method": "x"}}, "corda_method must be 'ipm' or 'kpm'; got 'x'"),
        ({"corda_config": {"cash_file": "x"}}, "unknown .'cash_file'."),
    ],
)
def test_errors_of_corda_leave_no_attribute(change: dict[str, Any], message: str) -> None:
    model, config = Net(), corda()
    for name, value in change.items():
        setattr(config, name, value)
    with pytest.raises(ConfigError, match=message):
        preprocess_corda(model, config, lambda: model(X))
    assert not any(hasattr(module, "eigens") for module in model.modules())


def test_corda_needs_a_function_finite_inputs_and_one_configuration() -> None:
    model = Net()
    with pytest.raises(ConfigError, match="give run_model"):
        preprocess_corda(model, corda())
    with pytest.raises(ConfigError, match="inputs of first are not all finite"):
        preprocess_corda(model, corda(), lambda: model(X / 0))
    preprocess_corda(model, corda(), lambda: model(X))
    other = corda()
    other.r = 2
    with pytest.raises(ConfigError, match="ran for rank 3, and the adapter has rank 2"):
        get_peft_model(model, other)
    assert hasattr(model.first, "eigens")
    get_peft_model(model, corda())
    assert not hasattr(model.first, "eigens")


# -- LoRA-GA ---------------------------------------------------------------------------------------------------------


def loraga(library: Any = None, **options: Any) -> Any:
    if library is peft:
        own: Any = peft.LoraGAConfig(**options)
        fixed: dict[str, Any] = {"init_lora_weights": "lora_ga", "target_modules": ["first"], "r": 2}
        return peft.LoraConfig(**fixed, lora_ga_config=own)
    return LoraConfig(
        init_lora_weights="lora_ga", target_modules=["first"], r=2, lora_ga_config=LoraGAConfig(**options)
    )


def steps_of(model: Any) -> Any:
    def steps() -> None:
        for rows in (X, X[:9]):
            model(rows).square().sum().backward()

    return steps


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # in HF PEFT
@pytest.mark.parametrize("direction", ["ArBr", "A2rBr", "ArB2r", "random"])
@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
def test_loraga_starts_as_in_peft(direction: str, scale: str) -> None:
    starts = []
    for library, preprocess in ((None, preprocess_loraga), (peft, loraga_of_peft.preprocess_loraga)):
        model = Net()
        config = loraga(library, direction=direction, scale=scale)
        preprocess(model, config, steps_of(model))
        torch.manual_seed(5)
        adapted: Any = peft.get_peft_model(model, config) if library else get_peft_model(model, config)
        layer = adapted.base_model.model.first
        starts.append((layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()))
        assert not hasattr(layer.base_layer, "_peft_loraga_grad")
        torch.testing.assert_close(adapted(X), Net()(X), atol=1e-4, rtol=1e-3)
    for one, other in zip(*starts, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_loraga_reads_a_conv1d_as_a_linear_layer() -> None:
    model = Net()
    config = loraga()
    config.target_modules = {"second"}
    preprocess_loraga(model, config, steps_of(model))
    adapted: Any = get_peft_model(model, config)
    assert adapted.base_model.model.second.lora_A["default"].weight.shape == (2, 10)
    torch.testing.assert_close(adapted(X), Net()(X), atol=1e-4, rtol=1e-3)


def test_loraga_restores_the_model_and_keeps_a_file(tmp_path: Path) -> None:
    model, file = Net().eval(), tmp_path / "gradients"
    model.unused.weight.requires_grad_(False)
    model.first.weight.grad = kept = torch.ones(10, 12)
    preprocess_loraga(model, loraga(), steps_of(model), file)
    assert model.first.weight.grad is kept and not model.unused.weight.requires_grad and not model.training
    assert model.first.weight.requires_grad and not model.first._forward_hooks
    other = Net()
    preprocess_loraga(other, loraga(), lambda: pytest.fail("the file is there"), file)
    assert torch.equal(other.first._peft_loraga_grad, model.first._peft_loraga_grad)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # in HF PEFT
def test_estimated_gradients_are_those_of_hf_peft() -> None:
    gradients = []
    for library, estimate in ((None, estimate_gradients), (peft, loraga_of_peft.estimate_gradients)):
        model = Net().eval()
        estimate(model, loraga(library), steps_of(model))
        assert not model.training and model.first.weight.grad is None
        gradients.append(model.first._peft_loraga_grad)
    torch.testing.assert_close(*gradients)


def test_loraga_says_which_layers_get_no_gradient() -> None:
    model, config = Net(), loraga()
    config.target_modules = {"first", "unused"}
    with pytest.warns(UserWarning, match=r"unused got no gradient \(1 layers in all\)"):
        preprocess_loraga(model, config, steps_of(model))
    with pytest.raises(ConfigError, match="no layer got a gradient"):
        preprocess_loraga(Net(), loraga(), lambda: None)
    config.lora_ga_config = None
    with pytest.raises(ConfigError, match="no lora_ga_config"):
        preprocess_loraga(Net(), config, lambda: None)
