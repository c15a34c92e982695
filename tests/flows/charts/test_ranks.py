from xml.etree import ElementTree

import numpy as np

from flows.charts.ranks import rank_heat_map, rank_picture

RANKS = {
    "model.layers.0.self_attn.q_proj": 5,
    "model.layers.0.mlp.up_proj": 0,
    "model.layers.1.self_attn.q_proj": 17,
    "lm_head": 3,
}


def words(svg: str) -> list[str]:
    return [str(element.text) for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("text")]


def test_every_layer_is_a_cell_in_the_row_of_its_kind_and_the_column_of_its_block() -> None:
    said = words(rank_heat_map(RANKS, "Ranks"))
    for expected in ("self_attn.q_proj", "mlp.up_proj", "lm_head", "–", "0", "1", "5", "17", "3", "Ranks"):
        assert expected in said
    assert "4 layers, 25 ranks in all, 6.2 on average" in said


def test_numbers_are_left_out_where_they_would_not_be_read() -> None:
    many = {f"h.{block}.attn": 77 for block in range(60)}
    assert "77" not in words(rank_heat_map(many, "Ranks"))


def test_the_picture_is_of_pixels_and_darker_where_ranks_are_higher() -> None:
    low, high = (rank_picture({"h.0.a": 1, "h.1.a": rank, "h.2.a": 40}, "Ranks") for rank in (2, 39))
    assert low.shape == high.shape and low.shape[2] == 4 and low.dtype == np.uint8
    assert high[..., :3].mean() < low[..., :3].mean()
