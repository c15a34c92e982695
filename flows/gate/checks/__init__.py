"""The gate's checks, one module per subject. Each check returns a `CheckResult`: passed or not, and a detail."""
