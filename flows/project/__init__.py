"""Projects: a folder with data that becomes a pipeline of its own by `peftcore init`, apart from this repository."""
