"""A snapshot answers from one reading; the registry reads anew."""

from typing import Any

from registries import add, of


def test_a_snapshot_stays_as_it_was_read(project: Any) -> None:
    registry = of(project)
    first = add(registry)
    registry.assign("champion", first, 0, "m")
    project.git("tag", "--annotate", "--message=m", "collected/docstrings/v0.0.9", "HEAD")
    project.git("tag", "--annotate", "--message=m", "approved/docstrings/v0.1.0/ada", "HEAD")
    before = registry.snapshot()
    second = add(registry, "v0.2.0")
    registry.assign("champion", second, 1, "m")
    assert (before.last_event(), before.versions()) == (1, [first])
    assert before.stages()["champion"].version == "v0.1.0"
    assert list(before.collected()) == ["v0.0.9"]
    assert [tag.name for tag in before.tags("approved/docstrings/v0.1.0/*")] == ["approved/docstrings/v0.1.0/ada"]
    assert before.tags("docstrings@v0.2.0") == []
    assert (registry.last_event(), registry.versions()) == (2, [first, second])
    assert registry.stages()["champion"].version == registry.snapshot().stages()["champion"].version == "v0.2.0"


def test_a_snapshot_has_no_tags_of_other_names(project: Any) -> None:
    registry = of(project)
    version = add(registry)
    project.git("tag", "--annotate", "--message=m", "docstrings2@v0.5.0", "HEAD")
    project.git("tag", "--annotate", "--message=m", "other", "HEAD")
    assert [tag.name for tag in registry.snapshot().tags("*")] == [version.tag]
