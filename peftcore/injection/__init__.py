"""Putting adapters into a model, choosing the active ones, merging them into the weights."""
