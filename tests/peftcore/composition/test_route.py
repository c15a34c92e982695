"""Routes: each row of a mixed batch equals that row alone, in forwards and in generation; bad routes are refused."""

from typing import Any

import pytest
import torch
from routed_models import GREEDY, TOKENS, adapted, assert_rows_as_alone, gpt2, llama, lora, mixture, t5
from transformers import BertConfig, BertForSequenceClassification, DynamicCache

from peftcore.composition import Average, Gate, Only, Parallel, Split, Stack
from peftcore.composition.route import Columns, Route, Run
from peftcore.errors import AdapterNameError, RoutingError

COMPOSED: list[Any] = [
    ["a", "b", None, "a", "__base__", "b"],
    ["a", "b", "c", "d", None, "c"],
    [{"a": 0.5, "b": -1.0}, Parallel("a", "b"), Average("a", "b"), Stack("a", "b"), None, 0.3 * Only("a")],
    [{"c": 0.5, "a": 1.0}, Stack("c", "d"), Stack({"a": 0.5, "d": 0.5}, "c"), "a", Average("c", "d"), "b"],
    [Split(a=2, b=3), Split(("c", 1), (None, 2), ("a", ...)), "a", None, Split(("a", 3), ({"b": 2.0}, ...)), "b"],
]


@pytest.mark.parametrize("base", [llama, gpt2])
@pytest.mark.parametrize("names", COMPOSED)
def test_each_row_equals_that_row_alone(base: Any, names: list[Any]) -> None:
    assert_rows_as_alone(mixture(base()), names)


def test_a_split_counts_decoded_tokens_too() -> None:
    model = mixture(llama())
    given = Split(("a", 9), ("b", ...))
    whole = model.generate(TOKENS[:2], adapter_names=given, **GREEDY)
    with torch.no_grad():
        logits = model(whole[:, :-1], adapter_names=given).logits
    assert torch.equal(logits[:, 6:].argmax(-1), whole[:, 7:])


@pytest.mark.parametrize("gradients", [True, False])
def test_a_split_refuses_a_layer_that_sees_only_some_tokens(gradients: bool) -> None:
    """`logits_to_keep` gives the head the last token; other layers with the same adapters have seen all tokens."""
    targets = ["o_proj", "lm_head"]
    model = adapted(llama(), a=lora(target_modules=targets), b=lora(target_modules=targets))
    with torch.set_grad_enabled(gradients), pytest.raises(RoutingError, match=r"lm_head sees tokens \(6, 1\)"):
        model(TOKENS, adapter_names=Split(a=3, b=4), logits_to_keep=1)


def test_rows_of_embeddings_and_of_pooled_states_equal_those_rows_alone() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    bert = BertForSequenceClassification(BertConfig(vocab_size=60, **sizes)).double()
    targets = ["query", "word_embeddings", "dense", "classifier"]
    model = adapted(bert, a=lora(target_modules=targets), b=lora(r=2, target_modules=targets))
    assert_rows_as_alone(model, ["a", "b", None, {"a": 0.5, "b": 1.0}])


# -- generation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}])
@pytest.mark.parametrize("padded", [False, True])
def test_generate_gives_each_row_its_own_text(options: dict[str, Any], padded: bool) -> None:
    model, names = mixture(llama()), ["a", "b", "c", None, {"a": 0.5, "d": 1.0}, Stack("a", "c")]
    mask = torch.ones_like(TOKENS)
    if padded:
        mask[1, :2] = mask[4, :3] = 0
    mixed = model.generate(TOKENS, attention_mask=mask, adapter_names=names, **GREEDY, **options)
    for row, name in enumerate(names):
        with model.route(name):
            own = {"attention_mask": mask[row : row + 1]}
            alone = model.generate(TOKENS[row : row + 1], **own, **GREEDY, **options)
        assert torch.equal(mixed[row, : alone.shape[1]], alone[0])


def test_generate_samples_from_each_rows_own_distribution() -> None:
    model, names = mixture(llama()), ["a", "b"]
    options = {**GREEDY, "do_sample": True, "num_return_sequences": 3, "top_k": 1}
    mixed = model.generate(TOKENS[:2], adapter_names=names, **options)
    alone = [model.generate(TOKENS[i : i + 1], adapter_names=name, **options) for i, name in enumerate(names)]
    assert torch.equal(mixed, torch.cat(alone))


def test_encoder_and_decoder_use_the_same_route() -> None:
    model = adapted(t5(), a=lora(), b=lora(r=2, target_modules=["q", "v"]))
    names = ["a", "b", None, "a"]
    assert_rows_as_alone(model, names, decoder_input_ids=TOKENS[:4, :3])
    mixed = model.generate(TOKENS[:4], adapter_names=names, **GREEDY)
    for row, name in enumerate(names):
        with model.route(name):
            alone = model.generate(TOKENS[row : row + 1], **GREEDY)
        assert torch.equal(mixed[row, : alone.shape[1]], alone[0])


def test_rows_with_caches_of_their_own_decode_as_alone() -> None:
    """A server does this: one cache per row, and other rows in each step."""
    model = mixture(llama(torch.float64))
    alone = {name: model.generate(TOKENS[:1], adapter_names=name, **GREEDY)[0] for name in ("a", "b")}
    with torch.no_grad():
        caches = {}
        for name in alone:
            caches[name] = DynamicCache(config=model.config)
            model(TOKENS[:1], cache=caches[name], adapter_names=[name])
        for step in range(7, 11):
            for name in ("a", "b"):
                token = alone[name][step].view(1, 1)
                logits = model(token, cache=caches[name], adapter_names=[name]).logits
                assert logits[0, -1].argmax() == alone[name][step + 1]


# -- bad input ------------------------------------------------------------------------------------------------------


def test_an_error_names_the_wrong_route() -> None:
    model = mixture(llama())
    expected = model(TOKENS).logits
    for names, error, said in (
        (["a", "b"], RoutingError, r"2 adapter names for a batch of 3 rows; give one for each row"),
        (["a"] * 4, RoutingError, r"4 adapter names for a batch of 3 rows"),
        (["a"], RoutingError, r"1 adapter names for a batch of 3 rows"),
        ([], RoutingError, "a route for no rows"),
        (["a", "z", "b"], AdapterNameError, r"Adapter z does not exist; loaded: a, b, c, d"),
        (["a", 3, "b"], RoutingError, "3 is no composition"),
    ):
        with pytest.raises(error, match=said):
            model(TOKENS[:3], adapter_names=names)
    model.merge_adapter(["a"])
    with pytest.raises(RoutingError, match=r"\['a'\] are merged into the base, so every row would use them"):
        model(TOKENS, adapter_names=["b"] * 6)
    model.unmerge_adapter()
    with model.route(["b"] * 6), pytest.raises(AdapterNameError, match="in use by an open route"):
        model.delete_adapter("b")
    assert torch.equal(model(TOKENS).logits, expected)


# -- one route --------------------------------------------------------------------------------------------------------

ADAPTERS = Columns(("a", "b", "a", "b"), (2, 1, 1, 2), {"a": None, "b": None})
"""Two layers that share an input, with the adapters a and b of ranks 2 and 1, and of ranks 1 and 2."""
ONE_EACH = Columns(("a", "b", "c"), (1, 1, 1), {"a": None, "b": None, "c": None})


def mask_of(route: Route, x: torch.Tensor, columns: Columns = ADAPTERS) -> torch.Tensor:
    """The effect of a route's mask on ones: the weight of each rank of each token."""
    mask = route.mask(x, "layer", columns, torch.float32)
    return mask.apply(torch.ones(x.shape[:-1].numel(), sum(columns.ranks)))


def test_equal_rows_make_a_uniform_route() -> None:
    assert Route(["a", "a"]).chain == Route("a").chain == ("a",)
    assert Route(["a", "b"]).uniform is None and Route(["a", "b"]).names == ("a", "b")
    assert Route([None, "__base__"]).chain == ()
    assert Route({"a": 0.5}).uniform is not None and Route({"a": 0.5}).chain is None


def test_rows_of_one_composition_form_one_group_and_copies_of_a_row_are_consecutive() -> None:
    groups = Route(["a", "b", "a"]).groups(torch.zeros(6, 4))  # each row twice, as for two beams
    assert [(str(one), rows.tolist()) for one, rows in groups] == [
        ("Only(name='a')", [0, 1, 4, 5]),
        ("Only(name='b')", [2, 3]),
    ]


def test_runs_are_consecutive_tokens_with_one_composition() -> None:
    route = Route(["a", "a", None, {"b": 2.0}])
    assert route.run_count == 3
    assert route.runs(8) == [Run(0, 4, {"a": 1.0}), Run(4, 6, {}), Run(6, 8, {"b": 2.0})]
    assert Route("a").run_count == Route(["a", Split(a=1)]).run_count == 0


def test_a_mask_repeats_each_adapters_weight_by_its_rank_in_every_layer() -> None:
    route = Route(["a", None, {"a": 0.5, "b": -2.0}])
    weights = mask_of(route, torch.zeros(3, 2, 4)).view(3, 2, 6)
    assert torch.equal(weights[:, 0], weights[:, 1])
    assert weights[:, 0].tolist() == [[1, 1, 0, 1, 0, 0], [0] * 6, [0.5, 0.5, -2, 0.5, -2, -2]]


def test_a_mask_removes_values_that_are_not_finite() -> None:
    mask = Route(["a", "b"]).mask(torch.zeros(2, 4), "layer", ADAPTERS, torch.float32)
    h = torch.ones(2, 6)
    h[0, 2] = h[1, 0] = torch.nan
    h[1, 3] = torch.inf
    assert mask.weights is None and mask.apply(h).tolist() == [[1, 1, 0, 1, 0, 0], [0, 0, 1, 0, 1, 1]]


def test_a_split_masks_by_position() -> None:
    route = Route([Split(("a", 2), ("b", ...)), "a"])
    route.begin(2, torch.tensor([[0, 1, 2], [-1, 0, 1]]))
    weights = mask_of(route, torch.zeros(2, 3, 4), ONE_EACH).view(2, 3, 3)
    assert weights.tolist() == [[[1, 0, 0], [1, 0, 0], [0, 1, 0]], [[1, 0, 0]] * 3]
    route.begin(2, torch.tensor([[3], [2]]))  # the next decoded token
    assert mask_of(route, torch.zeros(2, 1, 4), ONE_EACH).tolist() == [[0, 1, 0], [1, 0, 0]]
    with pytest.raises(RoutingError, match=r"layer sees tokens \(2, 5\), and the batch's text is \(2, 1\)"):
        mask_of(route, torch.zeros(2, 5, 4), ONE_EACH)


def test_a_gate_is_called_once_for_each_input_and_its_weights_are_not_cached() -> None:
    inputs = []

    def gating(path: str, adapters: Any, x: torch.Tensor) -> torch.Tensor:
        inputs.append(path)
        return x[..., :2]

    route = Route([Gate(("a", "b"), gating), None])
    route.begin(2, None)
    for scale in (1.0, 2.0):
        x = scale * torch.tensor([[[1.0, 3.0]], [[5.0, 7.0]]])
        assert mask_of(route, x, ONE_EACH).tolist() == [[scale, 3 * scale, 0], [0, 0, 0]]
    assert inputs == ["layer"] * 2


@pytest.mark.parametrize(
    ("specs", "places"),
    [
        (["a", "b", "c"], None),
        (["a", "a", "b", "b", "c", "c"], None),
        (["c", "a", "b"], 3),
        (["b", "a", "c", "c", "a", "b"], 6),
        (["a", "b"], 3),
        (["a", None, "b", "c"], 3),
        (["b", "b", "c", "b"], 9),
        (["c", "of another layer"], 3),
    ],
)
@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_blocks_add_to_each_row_the_products_of_its_adapter(
    specs: list[Any], places: int | None, tokens: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    blocks = Route(specs).blocks(ONE_EACH.names, torch.device("cpu"))
    assert blocks is not None and blocks.adapters == 3
    assert places == (None if blocks.row_of_place is None else len(blocks.row_of_place))
    a, b = torch.randn(3, 4, 2).double(), torch.randn(3, 2, 5).double()
    x, y = torch.randn(len(specs), tokens, 4).double(), torch.randn(len(specs), tokens, 5).to(dtype)
    number = {"a": 0, "b": 1, "c": 2}
    expected = [
        y[row] + x[row] @ a[number[name]] @ b[number[name]] if name in number else y[row]
        for row, name in enumerate(specs)
    ]
    blocks.add_products(y.view(-1, 5), blocks.grouped(x.view(-1, 4)).bmm(a), b)
    torch.testing.assert_close(y, torch.stack(expected).to(dtype), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "specs",
    [
        "a",
        [None, None],
        ["a", "b", {"c": 0.5}],
        ["a", "b", {"c": 0.5, "a": 1.0}],
        ["a", "b", Split(c=2)],
        ["a"] * 9 + ["b"],
    ],
)
def test_blocks_need_rows_with_one_adapter_of_weight_1_and_few_empty_places(specs: Any) -> None:
    many = [f"unused{number}" for number in range(5)]
    assert Route(specs).blocks([*ONE_EACH.names, *many], torch.device("cpu")) is None


def test_the_share_of_a_prompt_is_its_weight_in_each_row() -> None:
    route = Route(["a", {"a": 0.5, "b": 2.0}, None])
    assert route.shares("a", 6).tolist() == [1, 1, 0.5, 0.5, 0, 0] and route.rows_of("b") == [1]
    with pytest.raises(RoutingError, match=r"'a' acts on whole rows, and Split.* weights tokens"):
        Route([Split(a=3), "b"]).shares("a", 2)


def test_only_generation_may_repeat_rows() -> None:
    route = Route(["a", "b"])
    with pytest.raises(RoutingError, match="2 adapter names for a batch of 4 rows"):
        route.begin(4, None)
    route.repeats = True
    route.begin(4, None)
    assert route.rows == 4
    with pytest.raises(RoutingError, match="2 adapter names for a batch of 3 rows"):
        route.check_rows(3)
