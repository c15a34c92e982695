"""Prompt suites: answers of a model to the prompts of `evaluate.suites`, and the assertions about them."""
