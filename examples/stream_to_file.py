"""Make a video block by block and write each block as it comes.

    python examples/stream_to_file.py
"""

import inferix
from inferix.media import VideoWriter

engine = inferix.load(device="cpu")  # the small world in the package; "cuda" on a GPU
prompt = "a red robot in a snowy forest by day"
with engine.open(prompt=prompt, seed=0) as session, VideoWriter("robot.mp4", engine.fps, session.size, scale=4) as file:
    for block in session.stream(blocks=6):
        file.add(block.frames)  # uint8 [T, H, W, 3]; an encoder's thread takes it while the next block is made
        print(f"block {block.index}: {len(block.frames)} frames, denoised in {block.timings['denoise']:.3f} s")
print("wrote robot.mp4")
