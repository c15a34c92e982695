"""Automatic retraining: new data, a candidate, the gate, and a report."""
