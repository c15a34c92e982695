"""Hides HF PEFT from a process that has this folder in PYTHONPATH: a user's environment may lack it."""

import sys

sys.modules["peft"] = None  # type: ignore[assignment]  # find_spec then says that there is no such package
