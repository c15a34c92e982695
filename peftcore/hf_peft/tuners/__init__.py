"""`peft.tuners`: the configuration, model and layer classes of each method.

`peft.tuners.METHOD`, and its `config`, `layer` and `model`, are made at their first import
(`peftcore.hf_peft.alias`).
"""

from typing import Any

import peftcore


def __getattr__(name: str) -> Any:
    if name.startswith("__") or not name[:1].isupper():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(peftcore, name)
