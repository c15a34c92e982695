"""`PeftModel`: a model with adapters. The model is not wrapped: only its class changes.

`get_peft_model` sets the class of the model object to a subclass `(PeftModel, its class)` of the same name. So its
signature, module paths, `generate`, `config` and `isinstance` checks work as before.

`peft_model` has the class, and changes a model's class. The methods of `PeftModel` are in one file for each subject:
`loading`, `saving`, `activation`, `merging`, `training` and `inspection`. `generation` and `hf_attributes` have the
attributes that depend on the model's own class.
"""

from peftcore.model.peft_model import PeftModel, get_peft_model
from peftcore.model.peft_model import _unpickled as _unpickled  # its name in pickles
from peftcore.model.training import prepare_model_for_kbit_training

__all__ = ["PeftModel", "get_peft_model", "prepare_model_for_kbit_training"]
