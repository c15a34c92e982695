"""The detect stage on tiny model folders; no weight is there to read."""

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig

from flows.errors import BaseModelError
from flows.params import Params
from flows.paths import Paths
from flows.stages import detect
from peftcore.files import write_manifest

LLAMA = LlamaConfig(
    vocab_size=320,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    paths = Paths(tmp_path)
    write_config(paths, LLAMA.to_dict())
    return paths


def write_config(paths: Paths, config: dict[str, object] | str) -> None:
    paths.base.mkdir(parents=True, exist_ok=True)
    (paths.base / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    write_manifest(paths.base)


def test_writes_what_the_configuration_says(paths: Paths, capsys: pytest.CaptureFixture[str]) -> None:
    detect.run(Params(), paths)
    written = json.loads(paths.architecture.read_text())
    assert (written["family"], written["kind"], written["num_blocks"]) == ("llama", "causal decoder", 3)
    assert (written["hidden_size"], written["vocab_size"]) == (64, 320)
    assert written["default_targets"] == ["q_proj", "v_proj"]
    assert written["target_modules"]["k_proj"]["shapes"] == [[64, 32, 3]]
    assert written["tied_weights"] == [["model.embed_tokens.weight", "lm_head.weight"]]
    table = capsys.readouterr().out
    assert "LlamaForCausalLM" in table
    assert "down_proj" in table


def test_the_file_does_not_depend_on_when_it_is_written(paths: Paths) -> None:
    detect.run(Params(), paths)
    first = paths.architecture.read_bytes()
    detect.run(Params(), paths)
    assert paths.architecture.read_bytes() == first


def test_no_base_says_to_fetch(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="run `peftcore stage fetch`"):
        detect.run(Params(), Paths(tmp_path))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "nonesuch"}, "nonesuch"),
        ({"hidden_size": 64}, "model_type"),
        ({"model_type": "vit"}, "ViTConfig"),
        ({**LLAMA.to_dict(), "num_hidden_layers": "three"}, "num_hidden_layers"),
        ("{", "config.json"),
    ],
)
def test_an_unknown_architecture_is_refused_and_the_old_file_stays(
    paths: Paths, config: dict[str, object] | str, reason: str
) -> None:
    detect.run(Params(), paths)
    before = paths.architecture.read_bytes()
    write_config(paths, config)
    with pytest.raises(BaseModelError, match=reason):
        detect.run(Params(), paths)
    assert paths.architecture.read_bytes() == before


def test_a_damaged_base_is_refused(paths: Paths) -> None:
    (paths.base / "config.json").write_text("{}")
    with pytest.raises(BaseModelError, match="damaged"):
        detect.run(Params(), paths)
    assert not paths.architecture.exists()
