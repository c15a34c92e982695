"""One side of `benchmarks.plan`: the train stage in a process of its own, how long it took and what it has held.

python -m benchmarks.plan_side RESULT.json      in the folder of a pipeline
"""

import json
import sys
import time
from pathlib import Path

from flows.base.model import device
from flows.params import load_params
from flows.paths import Paths
from flows.runtime.machine_memory import peak_memory
from flows.runtime.stage import set_seed
from flows.stages import train


def main() -> None:
    paths = Paths(Path.cwd())
    params = load_params(paths.params)
    set_seed(params.project.seed)
    started, computed = time.perf_counter(), time.process_time()
    train.run(params, paths)
    found = {
        "peak": peak_memory(device()),
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - computed,
    }
    Path(sys.argv[1]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
