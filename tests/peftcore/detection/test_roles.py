"""Roles that the words in a layer's path name."""

import pytest

from peftcore.detection.roles import Role, word_role


@pytest.mark.parametrize(
    ("path", "role"),
    [
        ("self.query", "query"),
        ("output.dense", "output"),
        ("attn.query.linear", "query"),
        ("query_key_value", "fused_qkv"),
        ("kv_proj", "fused_kv"),
        ("query_key", "query"),
        ("pos_key_proj", None),
        ("c_attn", None),
    ],
)
def test_the_last_informative_segment_names_the_role(path: str, role: Role | None) -> None:
    assert word_role(path) == role
