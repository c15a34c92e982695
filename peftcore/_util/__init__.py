"""Helpers of the library itself that know no adapter."""
