import pytest

import peftcore
from peftcore import ConfigError
from peftcore.hf_peft import unsupported
from peftcore.registry import methods

CLASSES = [
    name
    for name, kind in vars(unsupported).items()
    if getattr(kind, "__module__", "") == unsupported.__name__ and isinstance(kind, type) and not name.startswith("_")
]


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_of_a_method_that_is_not_built_says_so(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name}: peftcore does not have this method .* docs/methods\.md"):
        getattr(peftcore, name)()


def test_no_built_method_is_refused() -> None:
    assert not {method.config.__name__ for method in methods().values()} & set(CLASSES)


@pytest.mark.parametrize("name", ["create_arrow_model", "get_eva_state_dict"])
def test_a_refused_function_names_the_way_that_exists(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name}: .*(arrow_gate|initialize_from_data)"):
        getattr(peftcore, name)()
