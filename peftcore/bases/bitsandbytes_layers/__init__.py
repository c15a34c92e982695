"""Subclasses of bitsandbytes' layers, in a package of their own because bitsandbytes need not be installed."""
