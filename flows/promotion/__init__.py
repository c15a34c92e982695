"""Registry, lineage and the gate between a version and production."""
