from docs_site.params import SECTION, params_page, read_entries


def test_every_key_has_its_values_its_default_and_its_meaning() -> None:
    lines = [line for line in params_page().splitlines() if line.startswith("| `") and SECTION not in line]
    rows = [line.strip("| ").split(" | ") for line in lines]
    assert len(rows) > 100
    assert not [row for row in rows if len(row) != 4 or not all(row) or row[2] == "``"]
    assert ["`merge.into`", "`best`, `dequantized`, `original`, `requantized`", "`best`"] in [row[:3] for row in rows]


def test_comments_go_on_below_and_values_may_hold_spaces_and_signs() -> None:
    text = "a:  # all of it\n  b: one two#three  # first,\n       # second\n  c: wheel:x==1   # third\nd: []\n"
    assert read_entries(text) == {
        "a": ("", "all of it"),
        "a.b": ("one two#three", "first, second"),
        "a.c": ("wheel:x==1", "third"),
        "d": ("[]", ""),
    }
