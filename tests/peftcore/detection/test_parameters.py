"""Parameters of a model: counts, ties, quantised storage."""

from detection_models import CASES, CAUSAL, GPT2, build
from torch import nn

from peftcore.detection import Architecture, detect


def test_tied_weights_name_every_place(architectures: dict[str, Architecture]) -> None:
    assert ("transformer.wte.weight", "lm_head.weight") in architectures["gpt2"].tied_weights
    assert architectures["llama"].tied_weights == ()
    untied = detect(build("gpt2", CAUSAL, **GPT2, tie_word_embeddings=False))
    assert untied.tied_weights == ()
    assert untied.parameters == architectures["gpt2"].parameters + 320 * 64


def test_parameters_are_those_that_torch_counts() -> None:
    for family in ("gpt2", "t5", "mixtral"):
        model = build(family, CASES[family][0], **CASES[family][1])
        assert detect(model).parameters == sum(p.numel() for p in model.parameters())


def test_quantised_layers_count_as_what_they_stand_for() -> None:
    from bitsandbytes.nn import Linear4bit

    model = nn.ModuleDict({"a": nn.Linear(64, 32), "b": nn.Linear(32, 8)})
    plain = detect(model)
    four_bit = Linear4bit(64, 32, quant_type="nf4")
    four_bit.load_state_dict(model["a"].state_dict())
    model["a"] = four_bit.to("cpu")
    found = detect(model)
    assert found.target_modules == plain.target_modules
    assert found.parameters == plain.parameters
    assert found.dtypes["uint8"] == 64 * 32
