"""Wrappers around the layers that adapters change, and how an adapted layer computes."""
