"""The shortest names for `target_modules` that reach layers of one role and nothing else."""

from collections.abc import Mapping

from peftcore.detection.module_tree import ModuleTree, pattern_of


def shortest_names(tree: ModuleTree, roles: Mapping[str, str]) -> dict[str, list[str]]:
    """{name: paths}: for each path with a role the shortest end of it that reaches paths of that role only.

    A path that only its whole pattern tells apart keeps that as its name, `*` for an index.
    """
    patterns: dict[str, list[str]] = {}
    for path in roles:
        patterns.setdefault(pattern_of(path), []).append(path)
    role_of: dict[str, set[str | None]] = {}
    for path in tree.modules:
        role_of.setdefault(pattern_of(path), set()).add(roles.get(path))
    by_end: dict[str, set[str | None]] = {}
    for pattern, found in role_of.items():
        for end in _ends(pattern):
            by_end.setdefault(end, set()).update(found)
    names: dict[str, list[str]] = {}
    for pattern, paths in patterns.items():
        name = next((end for end in _ends(pattern) if by_end[end] == role_of[pattern]), pattern)
        names.setdefault(name, []).extend(paths)
    return names


def _ends(pattern: str) -> list[str]:
    """Every end of a path, shortest first: `a.b.c` → `c`, `b.c`, `a.b.c`."""
    parts = pattern.split(".")
    return [".".join(parts[start:]) for start in reversed(range(len(parts))) if parts[start] != "*"]
