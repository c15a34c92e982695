"""Modules for the library itself that do not depend on adapters."""
