"""Cold start of a stream in a process of its own: computes one block and prints the time of each stage as JSON.

`bench.stream` starts it repeatedly: python -m inferix.bench.first_frame '{"model": "wan-tiny"}'. Times are of the
system's monotonic clock, which all processes of a machine share.
"""

from __future__ import annotations

import json
import sys
import time

from .subject import Subject, open_engine, prompt_arguments


def main() -> None:
    """Time a first block after the start of the process (cold) and another one (warm)."""
    marks = {"imported": time.perf_counter()}
    fields = json.loads(sys.argv[1])
    size = fields.pop("size")
    subject = Subject(**fields, size=tuple(size) if size else None)
    engine = open_engine(subject)
    marks["loaded"] = time.perf_counter()
    for name in ("cold", "warm"):
        marks[f"{name} asked"] = time.perf_counter()
        session = engine.open(**prompt_arguments(engine, subject.seed), seed=subject.seed, size=subject.size)
        marks[f"{name} opened"] = time.perf_counter()
        (block,) = session.stream(1)
        assert block.frames is not None
        marks[f"{name} shown"] = time.perf_counter()
        session.close()
    print(json.dumps(marks))


if __name__ == "__main__":
    main()
