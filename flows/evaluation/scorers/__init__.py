"""Scorers: functions of (prompt, answer, reference, row) that return a number for each answer.

An entry of `evaluate.scorers` names a built-in scorer, an installed one, or a function of a Python file.
"""
