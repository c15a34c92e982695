"""`peft.tuners`: the configuration, model and layer classes of each method.

`peft.tuners.METHOD`, and its `config`, `layer` and `model`, are made at their first import
(`peftcore.hf_peft.alias`).
"""

from typing import Any

import peftcore
from peftcore.hf_peft.alias import submodule


def __getattr__(name: str) -> Any:
    return getattr(peftcore, name) if name[:1].isupper() else submodule(__name__, name)
