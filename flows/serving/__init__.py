"""`peftcore serve`: the promoted adapters of a project behind HTTP."""
