"""Change prompt and action of a running stream from another thread; each change has a receipt.

    python examples/steer_live.py
"""

import threading

import inferix

engine = inferix.load(device="cpu")
session = engine.open(prompt="a blue fox in a green meadow at sunset", seed=3)
sent: dict[int, str] = {}  # number of a control -> what it was


def steer() -> None:
    """Send controls, as a keyboard or a network would, while blocks are made."""
    sent[session.act("right")] = "right"
    sent[session.prompt("a white ghost in a green meadow at night")] = "ghost"
    sent[session.act("up")] = "up"


hand = threading.Thread(target=steer)
with session:
    for block in session.stream(blocks=6):
        for ack in block.acks:
            print(f"block {block.index} is the first to show {sent[ack.id]!r}")
        if block.index == 1:
            hand.start()
            hand.join()
