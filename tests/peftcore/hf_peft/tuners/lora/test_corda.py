"""`peft.tuners.lora.corda` is importable under the names from which scripts import it."""

import peftcore.tuners.lora.corda

from peftcore.hf_peft import preprocess
from peftcore.hf_peft.tuners.lora import corda


def test_the_function_is_the_one_of_preprocess() -> None:
    assert peftcore.tuners.lora.corda.preprocess_corda is corda.preprocess_corda is preprocess.preprocess_corda
