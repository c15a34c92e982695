"""Review pages and comparisons of runs."""
