"""Layers of classes of bitsandbytes. They import it, so nothing imports them before such a layer is there."""
