"""A process that promotes as often as it is told, each time when all the others are as far: see test_concurrency.py.

    python promoting_process.py OTHERS_FOLDER NUMBER OF PUSH_TO < rounds > outcomes

Each line read is the name of a stage; each line written is what `peftcore promote` came to: its exit status and output.
"""

import json
import sys
import time
from pathlib import Path

from typer.testing import CliRunner

from flows.cli import app
from flows.gate import promote

SECONDS_TO_WAIT = 60.0


def main(meeting: Path, number: int, of: int, push_to: str) -> None:
    params = Path("params.yaml")
    given, judge, stage = params.read_text(), promote.evaluate_gate, ""

    def judge_and_wait(*arguments, **options):
        report = judge(*arguments, **options)
        (meeting / f"{stage}-{number}").touch()
        late = time.monotonic() + SECONDS_TO_WAIT
        while len(list(meeting.glob(f"{stage}-*"))) < of:
            assert time.monotonic() < late, f"not all have come as far: {sorted(meeting.glob(f'{stage}-*'))}"
            time.sleep(0.002)
        return report

    promote.evaluate_gate = judge_and_wait
    options = ["--push-to", push_to] if push_to else []
    print("ready", flush=True)
    for line in sys.stdin:
        stage = line.strip()
        params.write_text(f"{given}gate: {{stage: {stage}}}\n")
        done = CliRunner().invoke(app, ["promote", "--json", *options])
        told = {"stdout": done.stdout, "stderr": done.stderr, "exception": repr(done.exception)}
        print(json.dumps({"status": done.exit_code, **told}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
