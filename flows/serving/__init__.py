"""`peftcore serve`: adapters of a folder and the project's champion, behind one base."""
