"""The base model: sources, identity, and loading."""
