"""The promotion gate: its checks, its statistics, and promotion."""
