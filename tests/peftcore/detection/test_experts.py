"""Expert weights that are raw parameters."""

from detection_models import CAUSAL, LLAMA, build
from tiny_models import tiny

from peftcore.detection import Architecture, detect


def test_raw_experts(architectures: dict[str, Architecture]) -> None:
    experts = architectures["mixtral"].experts
    up, down = experts["experts.gate_up_proj"], experts["experts.down_proj"]
    assert (up.role, up.experts, up.in_features, up.out_features, up.count) == ("fused_gate_up", 4, 64, 352, 2)
    assert (down.role, down.in_features, down.out_features, down.transposed) == ("down", 176, 64, False)
    assert "MixtralTopKRouter" in architectures["mixtral"].unreached


def test_transposed_experts() -> None:
    sizes = {**LLAMA, "num_local_experts": 4, "head_dim": 16}
    up = detect(build("gpt_oss", CAUSAL, **sizes)).experts["experts.gate_up_proj"]
    assert (up.transposed, up.in_features, up.out_features) == (True, 64, 352)


def test_experts_in_layers_of_their_own() -> None:
    experts = {name: info.role for name, info in detect(tiny("jetmoe")).experts.items()}
    assert experts == {
        "mlp.input_linear.weight": "fused_gate_up",
        "mlp.output_linear.weight": "down",
        "experts.input_linear.weight": "query",
        "experts.output_linear.weight": "output",
    }
