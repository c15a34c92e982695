"""Computations that layers share: low-rank products, seeded dropout, matrix functions."""
