"""What a stage's code depends on, read from its imports."""

from pathlib import Path

from flows.runtime.stage_dependencies import code_dependencies, imported_modules, updated

ROOT = Path(__file__).parents[3]


def test_a_public_name_leads_to_its_module_alone() -> None:
    """`detect` imports from `peftcore`, which loads names on first use."""
    modules = imported_modules("flows.stages.detect")
    assert "peftcore.detection.detect" in modules
    assert not any(name.startswith(("peftcore.model", "peftcore.methods")) for name in modules)


def test_a_scanned_package_counts_as_a_whole() -> None:
    assert {"peftcore/methods", "peftcore/prompts"} <= set(code_dependencies(ROOT, "flows.stages.train"))


def test_c_that_a_module_compiles_counts_too() -> None:
    compiled = "peftcore/compiled"
    used = {f"{compiled}/library.py", f"{compiled}/low_rank.c", f"{compiled}/vectors.h"}
    for stage in ("train", "evaluate"):
        found = set(code_dependencies(ROOT, f"flows.stages.{stage}"))
        assert compiled in found or used <= found


def test_code_outside_of_the_project_is_no_dependency(tmp_path: Path) -> None:
    stage = {"cmd": "exec python -m flows.stages.detect", "deps": ["artifacts/base", "flows/stages/detect.py"]}
    assert updated(tmp_path, stage) == ["artifacts/base"]


def test_a_stage_of_another_program_is_left_alone() -> None:
    assert updated(ROOT, {"cmd": "python make.py", "deps": ["make.py"]}) is None
