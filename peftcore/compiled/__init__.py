"""Compiled C code, and the functions that call it. They take tensors alone, and know nothing of layers and adapters."""
