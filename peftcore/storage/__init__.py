"""Adapters as files: directories in PEFT's format, state dicts, checkpoints of a trainer."""
