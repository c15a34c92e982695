"""Roles of attention layers, by name and by shape."""

import pytest
from detection_models import roles
from tiny_models import tiny
from torch import nn

from peftcore.detection import detect


class Attention(nn.Module):
    def __init__(self, width: int, names: tuple[str, str, str, str]) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(width, width))


class Block(nn.Module):
    def __init__(self, width: int, names: tuple[str, str, str, str]) -> None:
        super().__init__()
        self.mix = Attention(width, names)
        self.w1, self.w2, self.w3 = (
            nn.Linear(width, 3 * width),
            nn.Linear(3 * width, width),
            nn.Linear(width, 3 * width),
        )


class Decoder(nn.Module):
    def __init__(self, outputs: int, names: tuple[str, str, str, str]) -> None:
        super().__init__()
        self.tokens = nn.Embedding(50, 16)
        self.trunk = nn.ModuleList(Block(16, names) for _ in range(3))
        self.answer = nn.Linear(16, outputs)


@pytest.mark.parametrize("names", [("wq", "wk", "wv", "wo"), ("a", "b", "c", "d")])
def test_a_plain_transformer_is_read_from_its_shapes(names: tuple[str, str, str, str]) -> None:
    found = detect(Decoder(50, names))
    attention = dict(zip(names, ("query", "key", "value", "output"), strict=True))
    assert roles(found) == {**attention, "w1": "gate", "w2": "down", "w3": "up", "answer": "head"}
    assert (found.block_pattern, found.num_blocks, found.hidden_size, found.vocab_size) == ("trunk.*", 3, 16, 50)


def test_torch_multihead_attention_keeps_its_output_projection_to_itself() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32), 2, enable_nested_tensor=False)
    found = detect(encoder)
    assert found.all_linear == found.feed_forward == ("linear1", "linear2")
    # the fused input projection (48, 16) and the output projection's own (16, 16), which its forward only reads
    assert found.unreached == {"MultiheadAttention": 2 * 48 * 16, "NonDynamicallyQuantizableLinear": 2 * 16 * 16}
    assert found.kind == "encoder"


def test_the_tokens_that_sparse_attention_looks_up_take_no_adapter() -> None:
    roles = {name: info.role for name, info in detect(tiny("deepseek_v32")).target_modules.items()}
    assert (roles["wq_b"], roles["wk"], roles["q_b_proj"]) == ("unknown", "unknown", "query")


def test_raw_attention_is_named_as_unreached() -> None:
    assert detect(tiny("xlnet")).unreached["XLNetRelativeAttention"] > 0
    assert detect(tiny("ibert")).unreached["QuantLinear"] > 0
