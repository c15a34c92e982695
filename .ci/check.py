#!/usr/bin/env python3
"""Check what changed since the main branch, within a minute on two cores: `make check`, or `.ci/check.py [COMMIT]`.

Format, lint, import layers and the types of the changed files run beside the tests. The tests are, in this order: the
changed test files, the test files that mirror a changed module, those that name one, and a smoke set. Tests that
SECONDS_OF_TESTS do not suffice for are skipped, and their number is printed; `make test` runs them all.
"""

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
SECONDS_OF_TESTS = 40
SMOKE = (
    "tests/test_makefile.py",
    "tests/peftcore/test_errors.py",
    "tests/peftcore/test_public_names.py",
    "tests/peftcore/test_config.py",
    "tests/peftcore/methods/test_lora.py",
)


def git(*arguments: str) -> list[str]:
    """Return the lines that git prints, none if git fails."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.split("\n")[:-1] if done.returncode == 0 else []


def changed_files(base: str | None) -> list[str]:
    """List files that differ from the commit where this branch began, untracked ones included."""
    start = [base] if base else git("merge-base", "HEAD", "origin/main") or git("merge-base", "HEAD", "main")
    if not start:
        sys.exit("error: no branch main or origin/main to compare with; name a commit: make check BASE=COMMIT")
    names = git("diff", "--name-only", *start) + git("ls-files", "--others", "--exclude-standard")
    return sorted({name for name in names if (ROOT / name).exists()})


def mirror(source: str) -> str:
    """Return the test file of a module: peftcore/a/b.py is tested by tests/peftcore/a/test_b.py."""
    path = Path("tests") / source
    return path.with_name(f"test_{path.stem.strip('_')}.py").as_posix()


def select_tests(changed: list[str]) -> list[str]:
    """Return the test files to run, the ones closest to the change first."""
    sources = [name for name in changed if re.match(r"(peftcore|flows)/.*\.py$", name)]
    modules = [name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in sources]
    # a package's root is named by nearly every test
    named = re.compile("|".join(rf"\b{re.escape(name)}\b" for name in modules if name.count(".")) or "(?!)")
    tests = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py"))
    order = [
        *(name for name in tests if name in changed),
        *filter(tests.__contains__, map(mirror, sources)),
        *(name for name in tests if named.search((ROOT / name).read_text(encoding="utf-8"))),
        *SMOKE,
    ]
    return list(dict.fromkeys(order))


class Deadline:
    """A pytest plugin that skips tests once their time is over."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds
        self.skipped = 0

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self) -> None:
        """Skip a test that begins after the end."""
        if time.monotonic() > self.end:
            self.skipped += 1
            pytest.skip("no time left; `make test` runs it")


def lint(changed: list[str]) -> Iterator[tuple[str, str]]:
    """Yield (command, output) of each check that fails."""
    typed = [name for name in changed if re.match(r"(peftcore|flows)/.*\.pyi?$", name)]
    commands = [["ruff", "format", "--check"], ["ruff", "check"], ["lint-imports"]]
    for command in commands + ([["pyright", *typed]] if typed else []):
        done = subprocess.run([BIN / command[0], *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            yield command[0], done.stdout + done.stderr


def main(base: str | None = None) -> int:
    """Run all checks; return 0 if nothing failed."""
    changed = changed_files(base)
    tests = select_tests(changed)
    print(f"{len(changed)} changed files, {len(tests)} test files", flush=True)
    deadline = Deadline(SECONDS_OF_TESTS)
    with ThreadPoolExecutor() as background:
        failures = background.submit(lambda: list(lint(changed)))
        arguments = ["-q", "-r", "fE", f"--rootdir={ROOT}", *(str(ROOT / name) for name in tests)]
        status = pytest.main(arguments, plugins=[deadline])
    for command, output in failures.result():
        print(f"{command}:\n{output}")
    if deadline.skipped:
        print(f"{deadline.skipped} tests were skipped, no time left; `make test` runs them")
    return int(status or bool(failures.result()))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
