"""The norms on the stream from block to block: what LN tuning trains. arXiv:2312.11420."""

from peftcore.detection.module_tree import ModuleTree
from peftcore.detection.names import shortest_names


def find_norms(tree: ModuleTree) -> dict[str, list[str]]:
    """{name for `target_modules`: paths} of the norms in blocks and after them that are as wide as the stream.

    Norms of queries and keys, of embeddings and inside a head are left out. A model without repeated blocks gives all.
    """
    if not tree.blocks:
        return shortest_names(tree, dict.fromkeys(tree.norms, "norm"))
    widths = {block: {tree.width(block), tree.stream(block)} for block in tree.blocks}
    lists = {block.rpartition(".")[0] for block in tree.blocks}
    holders = {path.rpartition(".")[0] for path in lists} | lists
    wide = set().union(*widths.values())
    chosen = {
        path: "norm"
        for path, size in tree.norms.items()
        if (
            size in widths[block]
            if (block := tree.block_of(path))
            else size in wide and path.rpartition(".")[0] in holders and "emb" not in path.rpartition(".")[2]
        )
    }
    return shortest_names(tree, chosen)
