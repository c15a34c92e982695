"""Any adapter of weights as plain LoRA, which every reader and every server takes.

`factors.py` the algebra, `low_rank_form.py` an adapter's change as two factors, `lora.py` its configuration and
tensors, `convert.py` the same in a model or a directory, `adalora.py` a directory of AdaLoRA without its model.
"""

from peftcore.conversion.adalora import convert_directory_to_lora
from peftcore.conversion.convert import convert_to_lora, save_as_lora
from peftcore.conversion.low_rank_form import Conversion

__all__ = ["Conversion", "convert_directory_to_lora", "convert_to_lora", "save_as_lora"]
