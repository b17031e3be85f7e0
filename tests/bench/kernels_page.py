"""Everything on a page of the documentation, in its order and in this folder: Python and commands run.

Run by test_own_kernels.py in a process of its own, with TRITON_INTERPRET=1. A Python block whose first line is a
comment with a name is a file; so is a JSON block, `cases.json`. `sample` writes the files only, and verifies the page's
kernel on two cases.
"""

import re
import shlex
import sys
from pathlib import Path

import torch
from typer.testing import CliRunner

from inferix.cli.main import app
from inferix.kernels.catalog import SPECS
from inferix.kernels.verify import verify

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run_command(line: str) -> None:
    words = [word for word in shlex.split(line) if word != "TRITON_INTERPRET=1"]
    assert words[0] == "inferix", line
    done = CliRunner().invoke(app, words[1:])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, (line, done.output)
    print(f"{line}\n{done.output}")


def run_page(path: Path, sample: bool) -> int:
    shared: dict[str, object] = {}
    blocks = BLOCK.findall(path.read_text("utf-8"))
    for language, text in blocks:
        if named := re.match(r"# (\w+\.py)\n", text):
            Path(named[1]).write_text(text, "utf-8")
        elif sample:
            continue
        elif language == "python":
            exec(compile(text, path.name, "exec"), shared)
        elif language == "json":
            Path("cases.json").write_text(text, "utf-8")
        else:
            for line in text.splitlines():
                run_command(line)
    return len(blocks)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.path.insert(0, "")
    page, chosen = sys.argv[1:]
    count = run_page(Path(page), chosen == "sample")
    if chosen == "sample":
        spec = SPECS["block_attention"]
        print(verify(spec, "my_kernel.py:my_attention", torch.float32, cases=spec.test_cases[1:4:2]))
    print(f"{count} blocks")
