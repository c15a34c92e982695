"""Prompt methods, one file each; importing a file registers its method. They change a model's input, not its layers."""
