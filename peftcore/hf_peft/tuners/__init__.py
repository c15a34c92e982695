"""`peft.tuners`: the configuration, model and layer classes of each method.

`peft.tuners.METHOD`, and its `config`, `layer` and `model`, are made at their first import
(`peftcore.hf_peft.alias`).
"""

from typing import Any

import peftcore
from peftcore.hf_peft.alias import is_submodule, submodule
from peftcore.hf_peft.reexports import reexported


def __getattr__(name: str) -> Any:
    if name[:1].isupper() and hasattr(peftcore, name):
        return getattr(peftcore, name)
    return submodule(__name__, name) if is_submodule(__name__, name) else reexported(__name__, name)
