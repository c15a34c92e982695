"""What the BOFT paper says: butterfly factors of small blocks make a dense orthogonal matrix; m = 1 is OFT, scaled."""

import itertools
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from layer_parity import agrees_with_peft
from method_example import Example, randomise
from safetensors.torch import load_file, save_file
from torch import nn

from peftcore import ConfigError, LoraConfig, PeftModel, get_peft_model
from peftcore.injection.adapter_set import adapter_set
from peftcore.methods.boft import BOFTConfig
from peftcore.methods.ia3 import IA3Config

pytestmark = pytest.mark.filterwarnings("ignore:Already following adapters were merged:UserWarning")

EXAMPLE = Example(
    BOFTConfig,
    options={"boft_block_size": 2, "boft_n_butterfly_factor": 2},
    layers={
        "Linear without bias": {"boft_n_butterfly_factor": 1, "boft_block_size": 3},
        "Conv2d": {"boft_n_butterfly_factor": 1, "boft_block_size": 0, "boft_block_num": 6},
        "Conv2d 1x1": {"boft_n_butterfly_factor": 1},
        "Conv3d": {"boft_n_butterfly_factor": 3},
    },
    theirs="BOFTConfig",
    parity={
        "size": {"boft_block_size": 4},
        "number": {"boft_block_size": 0, "boft_block_num": 8, "bias": "boft_only"},
    },
    targets={"gpt2": ["lm_head"], "bert": ["query", "intermediate.dense", "classifier"]},  # PEFT's BOFT knows no Conv1D
)


def adapted(layer: nn.Module, **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    net = get_peft_model(nn.Sequential(layer).double(), BOFTConfig(target_modules=["0"], **options))
    randomise(net, 0.5)
    return net, adapter_set(net).adapters("default")["0"]


def rotation(a: Any) -> torch.Tensor:
    """Bᵀ's rows from the adapter's own action on the unit vectors: x → x B."""
    return a.before(torch.eye(a.boft_R.shape[1] * a.boft_R.shape[2], dtype=torch.float64)).detach()


@pytest.mark.parametrize("m", [1, 2, 3])
def test_the_papers_formula_with_pefts_permutations(m: int) -> None:
    from peft.tuners.boft.layer import BOFTLayer

    n, number, size = 16, 4, 4
    layer, x = nn.Linear(n, 9).double(), torch.randn(5, n, dtype=torch.float64)
    weight, bias = layer.weight.clone(), layer.bias.clone()
    net, a = adapted(layer, boft_block_size=size, boft_n_butterfly_factor=m)
    b, eye = torch.eye(n, dtype=torch.float64), torch.eye(size, dtype=torch.float64)
    for j in range(m):
        order = BOFTLayer.block_butterfly_perm(None, n, number // 2**j, size // 2, m - 1)  # type: ignore[arg-type]
        p = torch.eye(n, dtype=torch.float64)[order]
        skew = (a.boft_R[j] - a.boft_R[j].mT).detach() / 2
        b = p @ torch.block_diag(*((eye - s) @ torch.linalg.inv(eye + s) for s in skew)) @ p.T @ b
    expected = (x @ b @ weight.T) * a.boft_s.flatten() + bias
    torch.testing.assert_close(net(x), expected, rtol=1e-12, atol=1e-12)


def test_factors_make_a_dense_orthogonal_matrix() -> None:
    reached = []
    for m in (1, 2, 3):
        _, a = adapted(nn.Linear(16, 9), boft_block_size=4, boft_n_butterfly_factor=m)
        b = rotation(a)
        torch.testing.assert_close(b @ b.T, torch.eye(16, dtype=torch.float64), rtol=1e-12, atol=1e-12)
        reached.append((b.abs() > 1e-9).sum(1).tolist())
    assert reached == [[4] * 16, [8] * 16, [16] * 16]


def test_only_what_the_layer_adds_to_its_bias_is_scaled() -> None:
    layer = nn.Linear(16, 9).double()
    bias = layer.bias.clone()
    net, _ = adapted(layer)
    zero = torch.zeros(1, 16, dtype=torch.float64)
    torch.testing.assert_close(net(zero)[0], bias)
    merged = net.merge_and_unload()[0]
    torch.testing.assert_close(merged.bias, bias)


@pytest.mark.parametrize("order", list(itertools.permutations(["boft", "ia3", "lora"])))
def test_any_mixture_is_what_merging_gives(order: tuple[str, ...]) -> None:
    """IA3 changes the bias that BOFT must leave as it is, so the order and what is merged must not matter."""
    torch.manual_seed(0)
    configs = {
        "boft": BOFTConfig(target_modules=["0"]),
        "ia3": IA3Config(target_modules=["0"], feedforward_modules=[]),
        "lora": LoraConfig(target_modules=["0"], r=2),
    }
    net: Any = get_peft_model(nn.Sequential(nn.Linear(16, 9)).double(), configs[order[0]], order[0])
    for name in order[1:]:
        net.add_adapter(name, configs[name])
    net.set_requires_grad(list(order))
    net.set_adapter(list(order))
    randomise(net, 0.4)
    x = torch.randn(3, 16, dtype=torch.float64)
    whole = net(x)
    for count in (1, 2, 3):
        net.merge_adapter(list(order[:count]))
        torch.testing.assert_close(net(x), whole, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["Conv2d", "Conv1d"])
def test_mixtures_on_a_convolution(kind: str) -> None:
    torch.manual_seed(0)
    layer = {"Conv2d": nn.Conv2d(4, 6, 3, padding=1), "Conv1d": nn.Conv1d(4, 6, 3)}[kind].double()
    net: Any = get_peft_model(nn.Sequential(layer), LoraConfig(target_modules=["0"], r=2), "lora")
    net.add_adapter("boft", BOFTConfig(target_modules=["0"]))
    net.add_adapter("ia3", IA3Config(target_modules=["0"], feedforward_modules=[]))
    net.set_requires_grad(["lora", "boft", "ia3"])
    randomise(net, 0.4)
    x = torch.randn(2, 4, *[7] * (1 + (kind == "Conv2d")), dtype=torch.float64)
    for order in itertools.permutations(["lora", "boft", "ia3"]):
        net.set_adapter(list(order))
        whole = net(x)
        net.merge_adapter(list(order))
        torch.testing.assert_close(net(x), whole, rtol=1e-10, atol=1e-10)
        net.unmerge_adapter()


def test_convolutions(tmp_path: Any) -> None:
    x = torch.randn(2, 6, 7, 7)
    for number, layer in enumerate((nn.Conv2d(6, 8, 3, padding=1, stride=2), nn.Conv2d(6, 8, 1))):
        options = {"boft_block_size": 3}
        agrees_with_peft(layer, x, "BOFTConfig", BOFTConfig, options, tmp_path / str(number))


def test_dropout_makes_blocks_of_one_factor_the_identity_while_training_only() -> None:
    net, a = adapted(nn.Linear(16, 16), boft_block_size=4, boft_n_butterfly_factor=2, boft_dropout=0.5)
    x = torch.randn(3, 16, dtype=torch.float64)
    whole = net.eval()(x)
    assert torch.equal(net(x), whole)
    net.train()
    chosen = set()
    for _ in range(30):
        same = [
            (acting - own).abs().amax((1, 2)) == 0 for acting, own in zip(a._acting_factors(), a.factors(), strict=True)
        ]
        assert sorted(int((~factor).sum()) for factor in same) == [0, 2]
        chosen.add(int(same[0].all()))
    assert chosen == {0, 1}
    net.merge_adapter()
    torch.testing.assert_close(net(x), whole)


def test_gradients_are_right() -> None:
    net, a = adapted(nn.Linear(8, 5), boft_block_size=2, boft_n_butterfly_factor=2)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *_: net(x), (x, a.boft_R, a.boft_s))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"boft_block_num": 4}, "either boft_block_size or boft_block_num .* got 4 and 4"),
        ({"boft_block_size": 0}, "got 0 and 0"),
        ({"boft_n_butterfly_factor": 0}, "boft_n_butterfly_factor must be a positive integer; got 0"),
        ({"boft_dropout": 1}, "below 1; got 1"),
        ({"bias": "lora_only"}, "'boft_only'; got 'lora_only'"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BOFTConfig(**options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"boft_block_size": 8}, "boft_block_size=8 must divide the 12 features of 0; try 6"),
        ({"boft_block_size": 3, "boft_n_butterfly_factor": 2}, "blocks of even size and a multiple of 2 of them"),
        ({"boft_block_size": 2, "boft_n_butterfly_factor": 3}, "a multiple of 4 of them; 0 has 6 blocks of 2"),
    ],
)
def test_blocks_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        get_peft_model(nn.Sequential(nn.Linear(12, 5)), BOFTConfig(target_modules=["0"], **options))


def test_permutations_that_hf_peft_saved_before_0_13_are_not_needed(tmp_path: Path) -> None:
    net, x = adapted(nn.Linear(12, 9))[0], torch.randn(3, 12, dtype=torch.float64)
    net.save_pretrained(tmp_path)
    expected, file = net(x), tmp_path / "adapter_model.safetensors"
    (tmp_path / "SHA256SUMS").unlink()
    save_file(load_file(file) | {"base_model.model.0.boft_P": torch.eye(12)[None]}, file)
    again = PeftModel.from_pretrained(net.unload(), tmp_path)
    torch.testing.assert_close(again(x), expected)


@pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension", "ignore:Setting boft_n_butterfly_factor")
def test_the_single_factor_that_hf_peft_makes_on_a_cpu_is_loaded(tmp_path: Path) -> None:
    """Without its compiled CUDA code, HF PEFT makes one factor and saves the configuration as it was given."""

    def net() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8))

    config = peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2, target_modules=["0"], init_weights=False)
    theirs: Any = peft.get_peft_model(net(), config).eval()  # type: ignore[arg-type]
    theirs.save_pretrained(tmp_path)
    assert theirs.peft_config["default"].boft_n_butterfly_factor == 2
    ours = PeftModel.from_pretrained(net(), tmp_path).eval()
    x = torch.randn(3, 8)
    torch.testing.assert_close(ours(x), theirs(x))
    assert ours.peft_config["default"].boft_n_butterfly_factor == 1
    ours.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(PeftModel.from_pretrained(net(), tmp_path / "again")(x), theirs(x))
