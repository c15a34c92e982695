"""Retraining that runs alone: new data, a candidate, the gate, and a report either way."""
