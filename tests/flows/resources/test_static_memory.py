"""Memory of a run without running it: the sum of its kinds, and the peak while the base is loaded."""

import pyarrow
import pytest
from pyarrow import parquet
from resource_cases import LINEARS_7B, batch, llama_7b, params
from transformers import Qwen2MoeConfig

from flows.paths import Paths
from flows.resources.batches import Workload, workload
from flows.resources.sizes import sizes, with_blocks
from flows.resources.static_memory import StaticMemory, blocks_are_alike
from flows.stages.detect import without_weights


def test_an_evaluation_may_need_more_than_a_step(paths: Paths) -> None:
    packed = params(
        train={"batching": "packed", "pack_tokens": 32, "batch_size": 64, "gradient_checkpointing": "blocks"}
    )
    longest = [[5] * 300] * 64
    parquet.write_table(pyarrow.table({"input_ids": longest, "labels": longest}), paths.split("validation"))
    found = StaticMemory(without_weights(paths.base).config, packed, workload(packed, paths))
    scores = 64 * 2 * 304 * 304  # of plain attention: rows, heads, and the row's pairs of tokens
    # in 16 bits and in 32 for the softmax, at one time at least
    assert found.memory()["evaluation, beyond training"] > 0.9 * (2 + 4) * scores
    short = params(train={"batch_size": 4})
    parquet.write_table(parquet.read_table(paths.split("train")).slice(0, 4), paths.split("validation"))
    calm = StaticMemory(without_weights(paths.base).config, short, workload(short, paths))
    assert calm.memory()["evaluation, beyond training"] == 0, "no gradients and no longer rows"


def test_sizes_that_were_counted_already_give_the_same_memory(paths: Paths) -> None:
    config, run = without_weights(paths.base).config, params()
    work = workload(run, paths)
    found = StaticMemory(config, run, work)
    assert StaticMemory(config, run, work, found.sizes).memory() == found.memory()
    assert found.peak == sum(found.memory().values())


def test_a_7b_llama_is_loaded_beside_its_file_and_its_largest_weight() -> None:
    two = with_blocks(llama_7b(), 2)
    one = batch(1, 8)
    work = Workload((one,), (one,), optimizer_steps=1, forward_passes=1, longest=8, prepared=True)
    found = StaticMemory(two, params(), work)
    largest = 32000 * 4096  # the embedding, like the output head
    linears = 2 * LINEARS_7B / 32
    in_four_bits = linears * (4 + 8 / 64 + 32 / (64 * 256)) / 8  # arXiv:2305.14314, section 3
    plain = 2 * 2 * largest
    assert found.loading == pytest.approx(in_four_bits + plain + found.sizes.mapped + (2 + 4) * largest, rel=1e-3)


@pytest.mark.parametrize(("dense", "alike"), [([], True), ([0], True), ([1], False), ([2, 3], False)])
def test_two_blocks_stand_for_all_if_those_after_the_first_are_alike(dense: list[int], alike: bool) -> None:
    """Dense blocks have no experts, so they have fewer weights than the others."""
    config = Qwen2MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=2, num_experts=8, shared_expert_intermediate_size=16,
        mlp_only_layers=dense, architectures=["Qwen2MoeForCausalLM"],
    )  # fmt: skip
    run = params(method={"target_modules": ["q_proj"]}, quantization={"storage": "none"})
    assert blocks_are_alike(config, run, sizes(config, run, 10)) == alike
