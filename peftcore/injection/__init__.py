"""Putting adapters into a model, choosing which of them act, merging them into the weights."""
