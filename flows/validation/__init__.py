"""Looks at prepared rows before they are trained on: masks, template, leakage and balance, with figures and fixes."""
