"""Prompt learners, one file each; importing one registers it. They adapt what the model reads, not its layers."""
