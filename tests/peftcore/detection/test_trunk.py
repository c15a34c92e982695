"""The trunk: the stack of blocks that processes the tokens."""

import pytest
from detection_models import CASES, build

from peftcore.detection import Architecture
from peftcore.detection.module_tree import ModuleTree
from peftcore.detection.trunk import find_trunk, token_embedding, vocab_size


@pytest.mark.parametrize(
    ("family", "pattern", "embedding"),
    [
        ("llama", "model.layers.*", "model.embed_tokens"),
        ("t5", "decoder.block.*", "shared"),
        ("whisper", "model.decoder.layers.*", "model.decoder.embed_tokens"),
        ("vit", "vit.layers.*", None),
    ],
)
def test_the_trunk_is_the_stack_of_the_tokens(family: str, pattern: str, embedding: str | None) -> None:
    model = build(family, CASES[family][0], **CASES[family][1])
    tree = ModuleTree(model)
    trunk = find_trunk(model, tree, dict.fromkeys(tree.layers, "unknown"), tuple(tree.block_lists()))
    assert trunk is not None and trunk.pattern == pattern
    assert token_embedding(model, tree) == embedding
    assert vocab_size(model, tree) == (None if embedding is None else 320)


def test_only_attention_with_a_pair_mask_is_packable(architectures: dict[str, Architecture]) -> None:
    packable = {family for family in ("llama", "gpt2", "bert", "mamba", "t5", "vit") if architectures[family].packable}
    assert packable == {"llama", "gpt2", "bert"}
