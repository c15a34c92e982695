"""Adapter methods, one file each; a file registers itself and knows no other."""
