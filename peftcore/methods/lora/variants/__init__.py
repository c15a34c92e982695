"""LoRA's variants, one per file; every file registers itself."""
