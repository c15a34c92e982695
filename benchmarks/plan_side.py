"""One side of `benchmarks.plan`: the train stage, in a process of its own, and the most memory that it has held.

python -m benchmarks.plan_side RESULT.json      in the folder of a pipeline
"""

import json
import os
import sys
import time
from pathlib import Path

import psutil

from flows.base_model import device
from flows.machine_memory import peak_memory
from flows.params import load_params
from flows.paths import Paths
from flows.stage import set_seed
from flows.stages import train


def main() -> None:
    paths = Paths(Path.cwd())
    params = load_params(paths.params)
    set_seed(params.project.seed)
    train.run(params, paths)
    seconds = time.time() - psutil.Process(os.getpid()).create_time()
    summary = json.loads(paths.training_summary.read_text())
    found = {"peak": peak_memory(device()), "seconds": seconds, "training": summary["seconds"]}
    Path(sys.argv[1]).write_text(json.dumps({**found, "steps": summary["steps"]}))


if __name__ == "__main__":
    main()
