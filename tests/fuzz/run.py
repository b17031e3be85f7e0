"""Fuzzer of the readers of user files: `make fuzz MINUTES=10 SEED=0`, or `python tests/fuzz/run.py --help`.

Damages valid files of every reader and reports raw errors, hangs, floods of memory, files made and code run. Exit
code 1 if there is any.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from time import monotonic

os.environ.setdefault("OMP_NUM_THREADS", "1")  # forked processes must not inherit threads
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "tools")]

from fuzz.readers import READERS  # noqa: E402
from fuzz.workers import BAD, Failure, Job, Limits, Sample, Tally, conclude, receive, run  # noqa: E402

ENOUGH = 5000  # inputs of a reader
HEAD = ("inputs", "structured", "accepted", "refused", *BAD)


def table(tallies: dict[str, Tally]) -> str:
    lines = [f"{'reader':18}" + "".join(f"{name:>11}" for name in HEAD) + f"{'ms':>7}"]
    rows = {name: figures(tally) for name, tally in tallies.items()}
    rows["all"] = [sum(column) for column in zip(*rows.values(), strict=True)]
    for name, row in rows.items():
        cost = f"{1000 * tallies[name].seconds / max(1, tallies[name].inputs):7.1f}" if name in tallies else ""
        lines.append(f"{name:18}" + "".join(f"{figure:11}" for figure in row) + cost)
    return "\n".join(lines)


def figures(tally: Tally) -> list[int]:
    return [tally.inputs, tally.structured, *(tally.outcomes[kind] for kind in ("accepted", "refused", *BAD))]


def save(failure: Failure, sample: Sample, seed: int, out: Path) -> Path:
    """Write the files of a failing input with the command that runs it again."""
    folder = out / f"{failure.reader}-{seed}-{failure.number}"
    files, _ = sample.input(seed, failure.number)
    for name, content in files.items():
        path = folder / "files" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (folder / "failure.txt").write_text(f"{failure.kind}\n{again(failure, seed)}\n\n{failure.detail}\n", "utf-8")
    return folder


def again(failure: Failure, seed: int) -> str:
    return f"python tests/fuzz/run.py --seed {seed} --reader {failure.reader} --input {failure.number}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="time for all readers  [default: 10]")
    parser.add_argument("--inputs", type=int, default=sys.maxsize, help="most inputs of each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", action="append", choices=list(READERS), help="repeatable  [default: all]")
    parser.add_argument("--input", type=int, help="run the input of this number alone")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=Path("outputs/fuzz"), help="folder for failing inputs")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout instead of a table")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as home:
        samples = {name: Sample.make(READERS[name], Path(home)) for name in options.reader or READERS}
        if options.input is not None:
            return one(samples, options)
        until = monotonic() + 60 * options.minutes
        saved: dict[tuple[str, ...], Failure] = {}

        def report(tallies: dict[str, Tally]) -> None:
            """Show the progress, and save each failure when it is first seen."""
            progress(tallies)
            for tally in tallies.values():
                for cause, failure in tally.failures.items() - saved.items():
                    saved[cause] = failure
                    folder = save(failure, samples[failure.reader], options.seed, options.out)
                    print(f"\n{failure.kind}: {folder}; {again(failure, options.seed)}", file=sys.stderr, flush=True)

        tallies = run(samples.values(), options.seed, Limits(), options.inputs, until, options.processes, report)
        print(file=sys.stderr)
        if options.json:
            print(json.dumps({name: dict(zip(HEAD, figures(tally), strict=True)) for name, tally in tallies.items()}))
        else:
            print(table(tallies))
        few = [name for name, tally in tallies.items() if tally.inputs < min(ENOUGH, options.inputs)]
        if few:
            print(f"fewer than {ENOUGH} inputs, give more minutes: {', '.join(few)}", file=sys.stderr)
    return 1 if saved else 0


def progress(tallies: dict[str, Tally]) -> None:
    inputs = sum(tally.inputs for tally in tallies.values())
    bad = sum(tally.outcomes[kind] for tally in tallies.values() for kind in BAD)
    print(f"\r{inputs} inputs, {bad} failures", end="", file=sys.stderr, flush=True)


def one(samples: dict[str, Sample], options: argparse.Namespace) -> int:
    """Run one input and print its failure, if it is one."""
    (sample,) = samples.values()
    tally = Tally()
    job = Job(sample, options.seed, Limits(), options.input, options.input + 1)
    while receive(job, tally):
        pass
    conclude(job, tally)
    print(dict(tally.outcomes))
    for failure in tally.failures.values():
        print(json.dumps(asdict(failure) | {"files": str(save(failure, sample, options.seed, options.out))}))
        print(failure.detail)
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
