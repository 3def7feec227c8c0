"""How much time `import truestep; truestep.BEMACallback` adds to importing Transformers' callbacks.

    python benchmarks/import_time.py [--rounds N]

Every round starts fresh interpreters. The addition is taken in two ways: by a clock in the process, and as the
difference between whole processes that import truestep as well and processes that do not.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from importlib.metadata import version

from measuring import Spread, wait_for_idle

_BASE = "import transformers; transformers.TrainerCallback"
_ADDED = "import truestep; truestep.BEMACallback"
_CLOCKED = f"import time; {_BASE}; begin = time.perf_counter(); {_ADDED}; print(time.perf_counter() - begin)"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="fresh processes of each kind (default: %(default)s)")
    rounds = parser.parse_args().rounds
    clocked: list[float] = []
    base: list[float] = []
    both: list[float] = []
    for number in range(-1, rounds):
        wait_for_idle(patience=1.0)
        seconds, without, with_it = float(_run(_CLOCKED)[1]), _run(_BASE)[0], _run(f"{_BASE}; {_ADDED}")[0]
        if number >= 0:  # the round before reads the files from disk
            clocked.append(seconds)
            base.append(without)
            both.append(with_it)
    print(f"Python {sys.version.split()[0]}, transformers {version('transformers')}, truestep {version('truestep')}")
    print(f"{_BASE!r} in a fresh process: {_in_words(base)}")
    print(f"{_ADDED!r} after it: {_in_words(clocked)} by a clock in the process,")
    print(f"  {_in_words([more - less for more, less in zip(both, base, strict=True)])} between whole processes")


def _run(program: str) -> tuple[float, str]:
    begin = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    return time.perf_counter() - begin, result.stdout


def _in_words(seconds: list[float]) -> str:
    spread = Spread.of(seconds)
    return f"{spread.median:.3f} s (quartiles {spread.low:.3f} to {spread.high:.3f}, {len(seconds)} processes)"


if __name__ == "__main__":
    main()
