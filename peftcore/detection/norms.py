"""The norms on the stream from block to block: what LN tuning trains. arXiv:2312.11420."""

from torch import nn

from peftcore.detection.module_tree import ModuleTree
from peftcore.detection.names import shortest_names


def find_norms(tree: ModuleTree) -> dict[str, list[str]]:
    """{name for `target_modules`: paths} of the norms in blocks and after them that are as wide as the stream.

    Norms of queries and keys, of embeddings and inside a head are left out. A model without such norms gives all.
    """
    widths = {block: {tree.width(block), tree.stream(block)} for block in tree.blocks}
    lists = {_parent(block) for block in tree.blocks}
    holders = {_parent(path) for path in lists} | lists
    # XLM keeps the norms of its blocks in lists of their own
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
