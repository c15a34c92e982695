"""flows takes from peftcore public names alone: of `peftcore`, its `cpu_decoding`, `cpu_quantization`, `errors`,
`files`, `hub` and `kv_cache`, and of its packages.
"""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODULES = (
    "peftcore",
    "peftcore.cpu_decoding",
    "peftcore.cpu_quantization",
    "peftcore.errors",
    "peftcore.files",
    "peftcore.files.hub",
    "peftcore.kv_cache",
)


def is_public(module: str) -> bool:
    folder = ROOT.joinpath(*module.split("."))
    return module in MODULES or (not folder.name.startswith("_") and (folder / "__init__.py").exists())


def is_module(package: str, name: str) -> bool:
    """Return True if a name of a package is one of its modules, and not a name that its `__init__` exports."""
    folder = ROOT.joinpath(*package.split("."))
    exported = (folder / "__init__.py").exists() and f'"{name}"' in (folder / "__init__.py").read_text()
    return (folder / f"{name}.py").exists() and not exported


def imports(source: Path) -> list[tuple[str, str]]:
    """Return (module, name) of everything that a file imports from peftcore, inside of functions too."""
    nodes = list(ast.walk(ast.parse(source.read_text())))
    froms = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    names = [(node.module or "", name.name) for node in froms for name in node.names]
    names += [(name.name, "") for node in nodes if isinstance(node, ast.Import) for name in node.names]
    return [(module, name) for module, name in names if module.split(".")[0] == "peftcore"]


def test_flows_imports_only_public_names() -> None:
    sources = sorted((ROOT / "flows").rglob("*.py"))
    pairs = [(source.relative_to(ROOT), *pair) for source in sources for pair in imports(source)]
    private = [
        f"{source}: {module}.{name}"
        for source, module, name in pairs
        if not is_public(module) or name.startswith("_") or is_module(module, name)
    ]
    assert private == []
    assert len(pairs) > 100
