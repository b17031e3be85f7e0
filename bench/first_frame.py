"""A process that starts from nothing, makes one block, and tells when it came how far: the cold start of a stream.

`bench.stream` runs it again and again: python -m inferix.bench.first_frame '{"model": "wan-tiny"}'. Times are on the
system's monotonic clock, which the processes of a machine share.
"""

from __future__ import annotations

import json
import sys
import time

from .subject import Subject, open_engine, told_prompt


def main() -> None:
    marks = {"imported": time.perf_counter()}
    given = json.loads(sys.argv[1])
    size = given.pop("size")
    subject = Subject(**given, size=tuple(size) if size else None)
    engine = open_engine(subject)
    marks["loaded"] = time.perf_counter()
    for name in ("cold", "warm"):
        marks[f"{name} asked"] = time.perf_counter()
        session = engine.open(**told_prompt(engine, subject.seed), seed=subject.seed, size=subject.size)
        marks[f"{name} opened"] = time.perf_counter()
        (block,) = session.stream(1)
        assert block.frames is not None
        marks[f"{name} shown"] = time.perf_counter()
        session.close()
    print(json.dumps(marks))


if __name__ == "__main__":
    main()
