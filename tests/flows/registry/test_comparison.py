"""Two records side by side: every value that differs, and nothing else."""

from flows.registry.comparison import Difference, differences

WEIGHTS = "adapter_model.safetensors"

RECORD = {
    "version": "v0.1.0",
    "metrics": {"adapter": {"loss": 2.5, "rouge_l": 0.3}},
    "params": {"method": {"name": "lora", "r": 16, "targets": ["q", "v"]}},
    "evaluation_set": "e1",
    "dvc": {"artifacts/data": "d1"},
    "git": {"commit": "c1", "uncommitted": []},
}


def test_what_differs_is_told_by_part_and_key() -> None:
    other = {
        **RECORD,
        "version": "v0.1.1",
        "metrics": {"adapter": {"loss": 2.25, "rouge_l": 0.3}},
        "params": {"method": {"name": "dora", "r": 16, "targets": ["q"], "alpha": 8}},
        "evaluation_set": "e2",
        "git": {"commit": "c1", "uncommitted": ["params.yaml"]},
    }
    found = differences(RECORD, other)
    assert found == [
        Difference("metrics", "adapter.loss", 2.5, 2.25),
        Difference("params", "method.name", "lora", "dora"),
        Difference("params", "method.targets", ["q", "v"], ["q"]),
        Difference("params", "method.alpha", None, 8),
        Difference("evaluation_set", "", "e1", "e2"),
        Difference("git", "uncommitted", [], ["params.yaml"]),
    ]
    assert [one.change for one in found[:4]] == [-0.25, None, None, None]


def test_a_record_is_what_it_is() -> None:
    assert differences(RECORD, {**RECORD, "version": "other", "created": "later"}) == []
    assert Difference("params", "x", True, False).change is None


def test_ranks_and_data_are_among_what_is_told() -> None:
    before = {"ranks": {"layers": 3, "usual": 8, "others": {}}, "data": {"rows": {"train": 10}}}
    after = {"ranks": {"layers": 3, "usual": 8, "others": {"layers.0.q": 4}}, "data": {"rows": {"train": 12}}}
    found = [(one.part, one.key, one.change) for one in differences(before, after)]
    assert found == [("ranks", "others.layers.0.q", None), ("data", "rows.train", 2)]
