"""`params.yaml`: its types, its file, its overrides."""
