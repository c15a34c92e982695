"""`peft.tuners.lora.loraga` is importable under the names from which scripts import it."""

import peftcore.tuners.lora.loraga

from peftcore.hf_peft import preprocess
from peftcore.hf_peft.tuners.lora import loraga


def test_the_function_is_the_one_of_preprocess() -> None:
    assert peftcore.tuners.lora.loraga.preprocess_loraga is loraga.preprocess_loraga is preprocess.preprocess_loraga
