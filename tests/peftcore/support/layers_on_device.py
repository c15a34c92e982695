"""python layers_on_device.py BUILD_FOLDER: each method on each kind of layer, on the second device and on the CPU."""

import copy
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from contract_cases import CASES, EXAMPLES, LAYERS, adapt, build
from contract_cases import make as adapted_on_cpu
from method_example import randomise
from second_device import DEVICE, Checks, check_close, check_on_device, register

from peftcore import PeftModel, convert_to_lora, get_peft_model_state_dict, set_peft_model_state_dict

COMBINATIONS = ("linear", "svd", "cat", "ties", "dare_linear", "magnitude_prune")


def check(checks: Checks, method: str, layer: str) -> None:
    """Adapt, train, save, load, merge, switch, mix and combine on the device; the CPU's numbers are right."""
    example, case = EXAMPLES[method], f"{method}, {layer}"
    on_cpu, x, plain = adapted_on_cpu(method, layer)
    expected, on_device = on_cpu(x).detach(), x.to(DEVICE)

    def moved() -> None:
        model = copy.deepcopy(on_cpu).to(DEVICE)
        check_on_device(model)
        check_close(model(on_device), expected, 1e-9)

    checks.step(f"{case}: moved", moved)
    model: Any = checks.step(f"{case}: adapted there", lambda: adapt(build(layer)[0].to(DEVICE), method, layer))
    if model is None:
        return

    def state_dict() -> None:
        check_on_device(model)
        set_peft_model_state_dict(model, get_peft_model_state_dict(on_cpu))
        check_close(model(on_device), expected, 1e-9)

    def trained() -> None:
        for each, given in ((model, on_device), (on_cpu, x)):
            each(given).pow(2).sum().backward()
            optimizer = torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], lr=1e-3)
            optimizer.step()
        check_on_device(model)
        check_close(model(on_device), on_cpu(x), 1e-7)

    def saved_and_loaded() -> None:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            loaded = PeftModel.from_pretrained(build(layer)[0].to(DEVICE), folder)
            loaded.load_adapter(folder, "again")
            loaded.set_adapter("again")
            check_on_device(loaded)
            check_close(loaded(on_device), model(on_device), 1e-9)

    def switched_off() -> None:
        with model.disable_adapter():
            check_close(model(on_device), plain, 1e-9)

    def merged() -> None:
        before = model(on_device)
        model.merge_adapter(safe_merge=True)
        check_on_device(model)
        check_close(model(on_device), before, 1e-7)
        model.unmerge_adapter()
        check_close(model(on_device), before, 1e-9)

    def mixed() -> None:
        model.add_adapter("second", example.make(layer, target_modules=["target"]))
        randomise(model, example.spread)
        model.eval()
        names = (["default", "second", "__base__"] * len(x))[: len(x)]
        rows = model(on_device, adapter_names=names)
        check_on_device(model)
        if not example.mixes_rows:
            for row, name in enumerate(names[:2]):
                model.set_adapter(name)
                check_close(rows[row : row + 1], model(on_device[row : row + 1]), 1e-7)
        model.set_adapter("default")

    def combined(combination: str) -> None:
        options = {} if combination in ("linear", "svd", "cat") else {"density": 0.5}
        model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "sum", combination_type=combination, **options)
        check_on_device(model)
        model.delete_adapter("sum")

    def there_and_back() -> None:
        before = model(on_device)
        check_close(model.to("cpu")(x), before, 1e-9)
        check_on_device(model.to(DEVICE))

    checks.step(f"{case}: state dict", state_dict)
    checks.step(f"{case}: trained", trained)
    checks.step(f"{case}: saved and loaded", saved_and_loaded)
    model.eval()
    checks.step(f"{case}: switched off", switched_off)
    if example.merges_on(layer):
        checks.step(f"{case}: merged", merged)
    checks.step(f"{case}: rows with different adapters", mixed)
    for combination in COMBINATIONS:
        checks.step(f"{case}: combined by {combination}", lambda combination=combination: combined(combination))
    if LAYERS[layer][0] == "linear":
        checks.step(f"{case}: converted", lambda: convert_to_lora(model, rank=4))
    checks.step(f"{case}: to the CPU and back", there_and_back)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    register(Path(sys.argv[1]))
    checks = Checks("ConfigError", "ConversionError", "MergeError")
    for case in CASES:
        check(checks, *case.values)  # type: ignore[arg-type]
    checks.finish()
