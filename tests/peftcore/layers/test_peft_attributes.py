"""Attributes that scripts read and write on HF PEFT's layers, compared with HF PEFT's own layers."""

import copy
import pickle
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import peftcore
from peftcore import ConfigError, PeftError


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double()


OPTIONS: dict[str, Any] = {"r": 2, "lora_alpha": 6, "target_modules": ["0", "1"], "init_lora_weights": False}


@pytest.fixture
def pair() -> tuple[Any, Any]:
    """The same adapter in both libraries."""
    theirs = peft.get_peft_model(base(), peft.LoraConfig(**OPTIONS))
    ours = peftcore.get_peft_model(base(), peftcore.LoraConfig(**OPTIONS))
    peftcore.set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs))
    return ours, theirs.base_model.model


def test_parameters_and_numbers_are_where_peft_has_them(pair: tuple[Any, Any]) -> None:
    ours, theirs = pair[0][1], pair[1][1]
    for name in ("lora_A", "lora_B"):
        torch.testing.assert_close(getattr(ours, name)["default"].weight, getattr(theirs, name)["default"].weight)
    for name in ("scaling", "r", "lora_alpha"):
        assert dict(getattr(ours, name)) == dict(getattr(theirs, name))
    assert (ours.in_features, ours.out_features) == (theirs.in_features, theirs.out_features)
    assert ours.lora_A["default"].in_features == theirs.lora_A["default"].in_features
    assert ours.lora_B["default"].out_features == theirs.lora_B["default"].out_features
    assert ours.get_base_layer() is ours.base_layer
    x = torch.randn(2, 6).double()
    torch.testing.assert_close(ours.lora_A["default"](x), theirs.lora_A["default"](x))


def test_the_base_weight_and_what_trains_of_one_layer(pair: tuple[Any, Any]) -> None:
    models = pair[0], pair[1]
    for model in models:
        for layer in (model[0], model[1]):
            layer.set_requires_grad("default", False)
            layer.set_requires_grad(["default", "other"], requires_grad=layer is model[1])
    for number in (0, 1):
        ours, theirs = (model[number] for model in models)
        assert torch.equal(ours.get_base_weight(), theirs.get_base_weight())
        assert ours.get_base_weight().data_ptr() == ours.base_layer.weight.data_ptr()
    trained = [[n.split("lora_")[1] for n, p in model.named_parameters() if p.requires_grad] for model in models]
    assert trained == [["A.default.weight", "B.default.weight"]] * 2


def test_an_embeddings_factors_are_parameters_themselves(pair: tuple[Any, Any]) -> None:
    ours, theirs = pair[0][0], pair[1][0]
    for name in ("lora_embedding_A", "lora_embedding_B"):
        torch.testing.assert_close(getattr(ours, name)["default"], getattr(theirs, name)["default"])


@pytest.mark.parametrize("layer", [0, 1])
def test_delta_weight_has_the_orientation_of_the_layers_weight(pair: tuple[Any, Any], layer: int) -> None:
    ours, theirs = pair[0][layer], pair[1][layer]
    torch.testing.assert_close(ours.get_delta_weight("default"), theirs.get_delta_weight("default"))
    assert ours.get_delta_weight("default").shape == ours.weight.shape


def test_changes_through_a_view_change_the_output(pair: tuple[Any, Any]) -> None:
    x = torch.arange(4)
    for change in (
        lambda layer: layer.scaling.__setitem__("default", 0.5),
        lambda layer: layer.lora_B["default"].weight.data.mul_(3),
        lambda layer: setattr(layer.lora_A["default"], "weight", nn.Parameter(torch.ones(2, 6).double())),
        lambda layer: layer.scale_layer(2.0),
        lambda layer: layer.set_scale("default", 0.25),
        lambda layer: layer.unscale_layer(),
    ):
        ours, theirs = pair
        change(ours[1])
        change(theirs[1])
        peftcore.refresh_adapters(ours)  # because of the edit through `.data`
        torch.testing.assert_close(ours(x), theirs(x))


def test_assigning_a_dictionary_of_scalings_sets_each(pair: tuple[Any, Any]) -> None:
    ours, theirs = pair
    for layer in (ours[1], theirs[1]):
        layer.scaling = {name: 2 * value for name, value in layer.scaling.items()}
    torch.testing.assert_close(ours(torch.arange(4)), theirs(torch.arange(4)))


def test_what_a_layer_says_of_its_adapters(pair: tuple[Any, Any]) -> None:
    ours, theirs = pair[0][1], pair[1][1]
    assert ours.active_adapters == theirs.active_adapters == ["default"]
    assert ours.merged_adapters == theirs.merged_adapters == []
    assert ours.disable_adapters is theirs.disable_adapters is False
    assert set(ours.adapter_layer_names) <= set(theirs.adapter_layer_names)
    pair[0].merge_adapter()
    assert ours.merged_adapters == ["default"]
    pair[0].unmerge_adapter()
    pair[0].disable_adapters()
    assert ours.disable_adapters is True


def test_modules_of_an_adapter_can_be_assigned(pair: tuple[Any, Any]) -> None:
    x, factor = torch.randn(3, 6).double(), nn.Linear(6, 2, bias=False).double()
    outputs = []
    for model in pair:
        layer = model[1]
        layer.lora_A["default"] = factor
        layer.lora_A.update({"default": factor})
        layer.lora_dropout["default"] = nn.Dropout(1.0)
        layer.train()
        dropped = layer(x)
        torch.testing.assert_close(dropped, layer.base_layer(x))
        layer.lora_dropout["default"] = nn.Identity()
        outputs.append(layer(x))
        assert not torch.allclose(outputs[-1], dropped)
    torch.testing.assert_close(*outputs)
    assert pair[0][1].lora_A["default"].weight is factor.weight


@pytest.mark.parametrize("start", [True, "gaussian"])
def test_start_values_are_drawn_again(pair: tuple[Any, Any], start: Any) -> None:
    for model in pair:
        linear, embedding = model[1], model[0]
        before = linear.lora_A["default"].weight.clone()
        for layer in (linear, embedding):
            layer.reset_lora_parameters("default", start)
            layer.reset_lora_parameters("absent", start)
            layer.reset_lora_parameters("default", False)
        assert not linear.lora_B["default"].weight.any() and not embedding.lora_embedding_A["default"].any()
        assert embedding.lora_embedding_B["default"].std() > 0.5
        drawn = linear.lora_A["default"].weight
        assert not torch.equal(drawn, before) and (start == "gaussian" or drawn.abs().max() <= linear.in_features**-0.5)


def test_what_cannot_be_written_is_an_error(pair: tuple[Any, Any]) -> None:
    layer = pair[0][1]
    with pytest.raises(ConfigError, match=r"with the parameters {'weight': \(2, 6\)}; got Linear with .*'bias'"):
        layer.lora_A["default"] = nn.Linear(6, 2)
    with pytest.raises(PeftError, match="is a view and cannot be replaced"):
        layer.lora_dropout["default"] = nn.ReLU()
    with pytest.raises(PeftError, match="no such adapter"):
        layer.scaling["other"] = 1.0
    with pytest.raises(PeftError, match="delete the whole adapter"):
        del layer.lora_A["default"]
    with pytest.raises(ConfigError, match=r"an nn\.Parameter of shape \(2, 6\)"):
        layer.lora_A["default"].weight = nn.Parameter(torch.ones(3, 6))
    with pytest.raises(PeftError, match="has no adapter 'other'"):
        layer.get_delta_weight("other")
    with pytest.raises(KeyError):
        layer.lora_A["other"]


def test_a_layer_has_no_attribute_of_other_methods(pair: tuple[Any, Any]) -> None:
    assert not hasattr(pair[0][1], "ia3_l")
    assert not hasattr(pair[0][1], "no_such_attribute")
    assert not any(hasattr(layers[1], "rank") for layers in pair)  # the rank is `r`


def test_a_method_without_factors_has_its_parameter_as_the_element() -> None:
    model = peftcore.get_peft_model(base(), peftcore.IA3Config(target_modules=["1"], feedforward_modules=[]))
    theirs = peft.get_peft_model(base(), peft.IA3Config(target_modules=["1"], feedforward_modules=[]))
    assert model[1].ia3_l["default"].shape == theirs.base_model.model[1].ia3_l["default"].shape
    assert isinstance(model[1].ia3_l["default"], nn.Parameter)
    for layer in (model[1], theirs.base_model.model[1]):
        layer.ia3_l["default"] = 2 * layer.ia3_l["default"].detach()
        assert isinstance(layer.ia3_l["default"], nn.Parameter)
    torch.testing.assert_close(model(torch.arange(4)), theirs(torch.arange(4)))
    with pytest.raises(ConfigError, match=r"must be a tensor of shape \(\d+, 1\); got Tensor of shape \(3,\)"):
        model[1].ia3_l["default"] = torch.ones(3)


def test_an_adapter_is_also_an_attribute_of_its_dictionary(pair: tuple[Any, Any]) -> None:
    ours, theirs = pair[0][1], pair[1][1]
    torch.testing.assert_close(ours.lora_A.default.weight, theirs.lora_A.default.weight)
    with pytest.raises(AttributeError, match="lora_A has no adapter 'other'"):
        _ = ours.lora_A.other


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda view: pickle.loads(pickle.dumps(view))])
def test_a_dictionary_can_be_copied_and_pickled(pair: tuple[Any, Any], duplicate: Any) -> None:
    view = pair[0][1].lora_A
    other = duplicate(view)
    assert list(other) == ["default"]
    torch.testing.assert_close(other.default.weight, view.default.weight)
    assert other.default.weight is not view.default.weight


def test_the_attributes_of_numbers_are_listed(pair: tuple[Any, Any]) -> None:
    ours, theirs = pair[0][1], pair[1][1]
    assert {"r", "lora_alpha", "scaling"} <= set(ours.other_param_names) & set(theirs.other_param_names)
    for name in ours.other_param_names:
        assert "default" in getattr(ours, name)


def test_doras_magnitude_is_a_module_with_a_weight() -> None:
    layers = []
    for library in (peftcore, peft):
        torch.manual_seed(0)
        model = library.get_peft_model(
            nn.Sequential(nn.Linear(4, 3)), library.LoraConfig(target_modules="0", use_dora=True)
        )
        layers.append(model.base_model.model[0])
    ours, theirs = (layer.lora_magnitude_vector["default"].weight for layer in layers)
    torch.testing.assert_close(ours, theirs)


def test_rows_that_train_are_an_adapter_of_their_own() -> None:
    models = []
    for library in (peftcore, peft):
        config = library.LoraConfig(r=2, target_modules=["1"], trainable_token_indices={"0": [2, 3]})
        models.append(library.get_peft_model(base(), config).base_model.model)
    ours, theirs = (model[0].token_adapter.trainable_tokens_delta.default for model in models)
    torch.testing.assert_close(ours, theirs)
    original = models[0][0].token_adapter.trainable_tokens_original["default"]
    torch.testing.assert_close(original, models[1][0].token_adapter.trainable_tokens_original["default"])
    assert models[0][0].original_module is models[0][0].base_layer
    for attribute in ("token_adapter", "original_module"):
        with pytest.raises(AttributeError):
            getattr(models[0][1], attribute)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set:UserWarning")
@pytest.mark.parametrize(
    "layer",
    [nn.Linear(6, 5), nn.Embedding(7, 6), nn.Conv2d(3, 4, 2), nn.Conv1d(2, 6, 3), Conv1D(5, 6)],
    ids=lambda layer: type(layer).__name__,
)
def test_every_kind_of_layer_has_the_sizes_of_its_input_and_output(layer: nn.Module) -> None:
    theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(layer)), peft.LoraConfig(r=2, target_modules=["0"]))
    ours = peftcore.get_peft_model(nn.Sequential(layer), peftcore.LoraConfig(r=2, target_modules=["0"]))
    expected = theirs.base_model.model[0]
    assert (ours[0].in_features, ours[0].out_features) == (expected.in_features, expected.out_features)


def test_a_number_may_have_the_name_of_its_method() -> None:
    layers = []
    for library in (peftcore, peft):
        config = library.WaveFTConfig(target_modules=["0"], n_frequency=7)
        layers.append(library.get_peft_model(nn.Sequential(nn.Linear(4, 4)), config).base_model.model[0])
    assert [layer.waveft_n_frequency["default"] for layer in layers] == [7, 7]


def test_only_layers_of_ia3_say_whether_their_input_is_scaled() -> None:
    config = peftcore.IA3Config(target_modules=["0", "1"], feedforward_modules=["1"])
    model = peftcore.get_peft_model(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), config)
    assert [layer.is_feedforward for layer in model] == [False, True]
    lora = peftcore.get_peft_model(nn.Sequential(nn.Linear(2, 2)), peftcore.LoraConfig(target_modules=["0"]))
    assert not hasattr(lora[0], "is_feedforward")


def test_a_head_that_follows_its_embedding_shows_the_same_rows() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
    model[1].weight = model[0].weight  # type: ignore[assignment]
    adapted = peftcore.get_peft_model(model, peftcore.TrainableTokensConfig(target_modules=["0"], token_indices=[1]))
    rows = [layer.trainable_tokens_delta["default"] for layer in adapted]
    assert rows[0] is rows[1]


def test_a_dictionary_is_the_same_object_only_for_the_same_parameters() -> None:
    config = peftcore.LoraConfig(r=2, target_modules=["1", "3"])
    model = peftcore.get_peft_model(base(), config)
    first = model[1].lora_A
    assert first is model[1].lora_A
    assert first is not model[3].lora_A and first is not model[1].lora_B
    model.add_adapter("other", config)
    assert list(first) == list(model[1].lora_A) == ["default", "other"]


@pytest.mark.parametrize("attribute", ["lora_A", "lora_embedding_A", "lora_magnitude_vector"])
def test_each_layer_of_lora_has_all_attributes_of_lora(pair: tuple[Any, Any], attribute: str) -> None:
    for ours, theirs in zip(pair[0][:2], pair[1][:2], strict=True):
        assert list(getattr(ours, attribute)) == list(getattr(theirs, attribute))


def test_layers_print_as_in_peft(pair: tuple[Any, Any]) -> None:
    for ours, theirs in zip(pair[0][:2], pair[1][:2], strict=True):
        assert repr(ours).split("(")[0] == repr(theirs).split("(")[0]
        assert all(f"({name}): " in repr(ours) for name in ours.adapter_layer_names)
    options = {"r": 2, "target_parameters": ["1.weight"]}
    layers = [lib.get_peft_model(base(), lib.LoraConfig(**options)).base_model.model[1] for lib in (peftcore, peft)]
    for layer in layers:
        assert repr(layer).replace("\n", "").startswith("lora.ParamWrapper(  parameter_name='weight'")


@pytest.mark.parametrize("options", [{"use_dora": True}, {}], ids=["dora", "plain"])
@pytest.mark.parametrize("kind", ["LoraConfig", "AdaLoraConfig"])
def test_a_script_that_looks_for_factors_finds_layers_alone(kind: str, options: dict[str, bool]) -> None:
    options = {"target_modules": ["0"], **(options if kind == "LoraConfig" else {"total_step": 9})}  # type: ignore[dict-item]
    found = []
    for library in (peftcore, peft):
        model = library.get_peft_model(nn.Sequential(nn.Linear(6, 5)), getattr(library, kind)(**options))
        names = ("lora_A", "lora_B", "lora_E", "lora_magnitude_vector")
        found.append([[name for name in names if hasattr(module, name)] for module in model.modules()])
    ours, theirs = ([set(names) for names in of if names] for of in found)
    assert len(ours) == len(theirs) == 1
    assert {"lora_A", "lora_B"} <= ours[0] <= theirs[0]


def test_dictionaries_are_of_hf_pefts_classes_and_have_their_methods(pair: tuple[Any, Any]) -> None:
    def facts(layer: Any) -> list[Any]:
        classes = (nn.ModuleDict, nn.ParameterDict, dict)
        names = ("lora_A", "lora_embedding_A", "lora_dropout", "scaling", "r")
        return [
            [[isinstance(getattr(layer, name), one) for one in classes] for name in names],
            [(name, parameter.shape) for name, parameter in layer.lora_A.named_parameters()],
            [parameter.shape for parameter in layer.lora_embedding_A.parameters()],
            list(layer.lora_B.state_dict()),
            layer.scaling.copy(),
        ]

    for number in (0, 1):
        ours, theirs = (model[number] for model in pair)
        assert facts(ours) == facts(theirs)
    pair[0][1].lora_A.requires_grad_(False)
    pair[0][1].lora_A.to(torch.float32)
    weight = pair[0][1].lora_A["default"].weight
    assert not weight.requires_grad and weight.dtype == torch.float32
    assert list(pickle.loads(pickle.dumps(pair[0][1].scaling))) == ["default"]


def test_a_layer_says_whether_its_weight_is_transposed() -> None:
    for kind in ("LoraConfig", "IA3Config"):
        for layer in (nn.Linear(4, 3), Conv1D(3, 4)):
            options: dict[str, Any] = {"target_modules": ["0"]} | (
                {"feedforward_modules": []} if kind[0] == "I" else {}
            )
            options["fan_in_fan_out"] = isinstance(layer, Conv1D)
            ours, theirs = (
                library.get_peft_model(nn.Sequential(copy.deepcopy(layer)), getattr(library, kind)(**options))
                for library in (peftcore, peft)
            )
            assert ours[0].fan_in_fan_out is theirs.base_model.model[0].fan_in_fan_out is isinstance(layer, Conv1D)


@pytest.mark.parametrize(
    ("config", "options", "names"),
    [
        ("OFTConfig", {"r": 2, "oft_block_size": 0}, ("r", "oft_block_size")),
        ("OFTConfig", {"r": 0, "oft_block_size": 3}, ("r", "oft_block_size")),
        ("BOFTConfig", {"boft_block_size": 3}, ("boft_block_size", "boft_block_num")),
        ("BOFTConfig", {"boft_block_size": 0, "boft_block_num": 3}, ("boft_block_size", "boft_block_num")),
        (
            "AdaLoraConfig",
            {"init_r": 4, "target_r": 2, "lora_alpha": 6, "total_step": 9},
            ("r", "scaling", "lora_alpha"),
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_numbers_that_follow_from_the_layer_are_those_of_peft(config: str, options: Any, names: Any) -> None:
    models = [
        lib.get_peft_model(base(), getattr(lib, config)(target_modules=["1"], **options)) for lib in (peftcore, peft)
    ]
    ours, theirs = models[0][1], models[1].base_model.model[1]
    for name in names:
        assert dict(getattr(ours, name)) == pytest.approx(getattr(theirs, name), rel=1e-12), name


def test_the_scaling_of_an_adalora_changes_its_output_as_in_peft() -> None:
    options: Any = {"target_modules": ["1"], "init_r": 4, "target_r": 2, "total_step": 9, "init_lora_weights": False}
    theirs: Any = peft.get_peft_model(base(), peft.AdaLoraConfig(**options))
    ours: Any = peftcore.get_peft_model(base(), peftcore.AdaLoraConfig(**options))
    peftcore.set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs))
    x = torch.arange(4)
    for layer in (ours[1], theirs.base_model.model[1]):
        layer.scaling["default"] = 3.0
    torch.testing.assert_close(ours(x), theirs(x))
