"""Fork a stream into two worlds, steer them apart, and measure by how much they differ.

    python examples/fork_and_compare.py
"""

import numpy as np

import inferix
from inferix.media import contact_sheet

engine = inferix.load(device="cpu")
first = engine.open(prompt="a red robot in a snowy forest by day", seed=0)
for _ in first.stream(blocks=3):
    pass
second = first.fork()  # pages are shared until one of the two writes
pictures, labels = [], []
for _ in range(3):
    first.act("right")
    second.act("left")
    here, there = next(first.stream(1)), next(second.stream(1))
    difference = np.abs(here.frames.astype(int) - there.frames).mean()
    print(f"block {here.index}: right and left differ by {difference:.1f} of 255 per value")
    pictures += [here.frames[-1], there.frames[-1]]
    labels += [f"block {here.index}, right", f"block {there.index}, left"]
contact_sheet(pictures, "fork.png", columns=2, labels=labels)
first.close()
second.close()
print("wrote fork.png")
