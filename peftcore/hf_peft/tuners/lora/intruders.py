"""`peft.tuners.lora.intruders`."""

from peftcore.conversion.intruders import reduce_intruder_dimension

__all__ = ["reduce_intruder_dimension"]
