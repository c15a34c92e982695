"""Placement of virtual tokens (90, 91) in padded rows; padding is 0."""

import pytest
import torch

from peftcore.errors import ConfigError
from peftcore.prompts.placement import check_not_packed, mask_of, placement, text_positions

TEXT = torch.tensor([[0, 0, 1, 2, 3], [1, 2, 3, 4, 5], [1, 2, 0, 0, 0]])
MASK = (TEXT != 0).long()
PROMPT = torch.tensor([[90, 91]]).expand(3, -1)


def test_the_prompt_stands_between_left_padding_and_text() -> None:
    place = placement(MASK, 2)
    assert place.insert(PROMPT, TEXT).tolist() == [
        [0, 0, 90, 91, 1, 2, 3],
        [90, 91, 1, 2, 3, 4, 5],
        [90, 91, 1, 2, 0, 0, 0],
    ]
    assert place.extend(MASK, 1).tolist() == [[0, 0, 1, 1, 1, 1, 1], [1] * 7, [1, 1, 1, 1, 0, 0, 0]]
    assert place.shift(TEXT, -100).tolist()[0] == [0, 0, -100, -100, 1, 2, 3]


def test_all_padding_can_go_to_the_front() -> None:
    place = placement(MASK, 2, all_pads_first=True)
    assert place.insert(PROMPT, TEXT).tolist()[2] == [0, 0, 0, 90, 91, 1, 2]


@pytest.mark.parametrize("filler_behind", [False, True])
def test_filler_is_masked(filler_behind: bool) -> None:
    count = torch.tensor([[0], [1], [2]])
    place = placement(MASK, 2, filler_count=count, filler_behind=filler_behind)
    assert place.extend(MASK, 1).sum(1).tolist() == (MASK.sum(1) + 2 - count[:, 0]).tolist()
    row = place.insert(PROMPT, TEXT)[1].tolist()
    assert row == ([91, 1, 2, 3, 4, 5, 90] if filler_behind else [90, 91, 1, 2, 3, 4, 5])


def test_positions_count_prompt_and_text() -> None:
    positions = placement(MASK, 2).extend_positions(text_positions(MASK))
    assert positions[0].tolist()[2:] == [0, 1, 2, 3, 4] and positions[1].tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_positions_of_several_axes_are_those_of_each() -> None:  # time, height and width in Qwen2-VL
    axes = torch.stack([text_positions(MASK), text_positions(MASK) + 1, text_positions(MASK) + 2])
    place = placement(MASK, 2)
    expected = torch.stack([place.extend_positions(positions) for positions in axes])
    assert torch.equal(place.extend_positions(axes), expected)


def test_prepared_masks_and_packed_rows_are_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be extended by a prompt"):
        mask_of({"attention_mask": torch.ones(1, 1, 4, 4)}, "attention_mask")
    with pytest.raises(ConfigError, match="documents are packed"):
        check_not_packed({"position_ids": torch.tensor([[0, 1, 0, 1]])})
