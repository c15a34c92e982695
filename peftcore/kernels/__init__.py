"""Computations that layers share: low-rank products, dropout, start values, matrix functions."""
