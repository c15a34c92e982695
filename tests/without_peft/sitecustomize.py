"""Hides HF PEFT from a process that has this folder in PYTHONPATH, as in an environment of a user, who has none."""

import sys

sys.modules["peft"] = None  # type: ignore[assignment]  # find_spec then says that there is no such package
