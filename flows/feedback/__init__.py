"""Recorded ratings as rows of training data."""
