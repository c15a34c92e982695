"""The commands of `peftcore`, a module for each group. Heavy libraries are imported by the command that needs them."""
