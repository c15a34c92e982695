"""Validation of prepared rows before training: masks, template, leakage and balance, with figures and fixes.

The command is `peftcore doctor`.
"""
