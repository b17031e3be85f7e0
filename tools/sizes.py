"""Files and lines of Python by folder, and the longest files; compare before and after a change.

    python tools/sizes.py [--depth 2]
"""

import argparse
import subprocess
from collections import Counter
from pathlib import Path

parser = argparse.ArgumentParser(description="Files and lines of Python by folder, and the longest files.")
parser.add_argument("--depth", type=int, default=2, help="folder levels to show (default 2)")
depth = parser.parse_args().depth
paths = subprocess.run(["git", "ls-files", "*.py"], check=True, capture_output=True, text=True).stdout.split()
lines = {path: len(Path(path).read_text("utf-8").splitlines()) for path in paths if Path(path).exists()}
files, total = Counter[str](), Counter[str]()
for path, count in lines.items():
    folder = "/".join(path.split("/")[:-1][:depth]) or "."
    files[folder], total[folder] = files[folder] + 1, total[folder] + count
for folder in sorted(total):
    print(f"{folder:32} {files[folder]:4} files {total[folder]:7} lines")
print(f"{'all':32} {len(lines):4} files {sum(lines.values()):7} lines")
print("longest:", ", ".join(f"{path} {count}" for path, count in Counter(lines).most_common(5)))
