"""The registry of a project with a list of signers: only their tags give and withdraw a stage."""

from pathlib import Path
from typing import Any

from registries import Key, add, needs_keys, of

from flows.params import Gate
from flows.registry.project_registry import deciding_tags
from flows.registry.registry import Registry
from flows.runtime.git import Git


@needs_keys
def test_unsigned_tags_give_and_take_no_stage_where_signers_are_listed(project: Any, key: Key, signers: Path) -> None:
    registry = of(project, key("ada"))
    first, second = add(registry), add(registry, "v0.2.0")
    registry.assign("champion", first, 0, "promoted\n")
    project.git("tag", "--annotate", "--message=mine", "docstrings#champion#99", f"{second.tag}^{{}}")
    gate = Gate(allowed_signers=str(signers))
    assert registry.stages()["champion"].version == "v0.2.0", "anybody's tags count where nobody is listed"

    def holder() -> str | None:
        trusting = Registry(Git(project.root), "docstrings", decides=deciding_tags(gate, Git(project.root)))
        assert trusting.last_event() >= 99, "the number is taken all the same"
        held = trusting.stages().get("champion")
        assert [one.version for one in trusting.holders("champion")] == ["v0.1.0"]
        return held and held.version

    assert holder() == "v0.1.0"
    project.git("tag", "--annotate", "--message=mine", "docstrings#champion!#100", f"{first.tag}^{{}}")
    project.git("tag", "--annotate", "--message=mine", "docstrings@v0.1.0!#101", f"{first.tag}^{{}}")
    assert holder() == "v0.1.0"
