"""Names for `target_modules`: the shortest path suffix that matches layers of one role only, and names of norms.

The norms are those of the residual stream, which LN tuning trains (arXiv:2312.11420).
"""

from collections.abc import Mapping

from torch import nn

from peftcore.detection.module_tree import ModuleTree, pattern_of


def shortest_names(tree: ModuleTree, roles: Mapping[str, str]) -> dict[str, list[str]]:
    """Return {name: paths}, where a name is the shortest path suffix that matches no module of another role.

    Modules that are not in `roles` count as modules of another role. If there is no such suffix, the name is the whole
    path, with `*` for each index except a final one.

    Args:
        tree: The model's module tree.
        roles: {path: role} of the layers to name.
    """
    patterns: dict[str, list[str]] = {}
    for path in roles:
        patterns.setdefault(pattern_of(path), []).append(path)
    role_of: dict[str, set[str | None]] = {}
    for path in tree.modules:
        role_of.setdefault(pattern_of(path), set()).add(roles.get(path))
    by_suffix: dict[str, set[str | None]] = {}
    for pattern, pattern_roles in role_of.items():
        for suffix in _suffixes(pattern):
            by_suffix.setdefault(suffix, set()).update(pattern_roles)
    names: dict[str, list[str]] = {}
    for pattern, paths in patterns.items():
        name = next((each for each in _suffixes(pattern) if by_suffix[each] == role_of[pattern]), pattern)
        names.setdefault(name, []).extend(paths)
    return names


def norm_names(tree: ModuleTree) -> dict[str, list[str]]:
    """Return {name for `target_modules`: paths} of the norms of the residual stream, inside blocks and outside of them.

    Norms of queries and keys, of embeddings and inside a head are excluded. If nothing remains, all norms are returned.
    """
    widths = {block: {tree.width(block), tree.stream(block)} for block in tree.blocks}
    lists = {_parent(block) for block in tree.blocks}
    holders = {_parent(path) for path in lists} | lists
    # XLM has its blocks' norms in separate lists
    holders |= {path for path, m in tree.modules.items() if isinstance(m, nn.ModuleList) and _parent(path) in holders}
    wide = {width for both in widths.values() for width in both}
    chosen = {
        path: "norm"
        for path, size in tree.norms.items()
        if (
            size in widths[block]
            if (block := tree.block_of(path))
            else size in wide and _parent(path) in holders and "emb" not in path.rpartition(".")[2]
        )
    }
    return shortest_names(tree, chosen or dict.fromkeys(tree.norms, "norm"))


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _suffixes(pattern: str) -> list[str]:
    """Return the suffixes of a path that do not begin with `*`, shortest first: `a.b.c` → `c`, `b.c`, `a.b.c`."""
    parts = pattern.split(".")
    return [".".join(parts[start:]) for start in reversed(range(len(parts))) if parts[start] != "*"]
