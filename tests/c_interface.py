"""Drives libinferix through its C interface with numpy alone: LIBRARY ENGINE FOLDER PROMPT PROMPT.

A process of its own, since a library with ops for torch must not meet the package, which has them too. Writes the
frames of six blocks to FOLDER/frames.npy, with an action, another prompt, and a save and restore between them.
"""

import ctypes
import sys

import numpy as np


class Block(ctypes.Structure):
    _fields_ = (
        ("index", ctypes.c_int64), ("frames", ctypes.POINTER(ctypes.c_uint8)), ("pictures", ctypes.c_int64),
        ("height", ctypes.c_int64), ("width", ctypes.c_int64), ("latents", ctypes.POINTER(ctypes.c_float)),
        ("latent_frames", ctypes.c_int64), ("channels", ctypes.c_int64), ("latent_height", ctypes.c_int64),
        ("latent_width", ctypes.c_int64),
    )  # fmt: skip


def main(path: str, engine: str, folder: str, *prompts: str) -> None:
    library = ctypes.CDLL(path)
    library.inferix_open.restype = library.inferix_restore.restype = ctypes.c_void_p
    library.inferix_error.restype = ctypes.c_char_p
    place, first, second = engine.encode(), prompts[0].encode(), prompts[1].encode()

    def next_block(stream: ctypes.c_void_p, index: int) -> np.ndarray:
        block = Block()
        assert library.inferix_next_block(stream, ctypes.byref(block)) == 0, library.inferix_error()
        assert block.index == index
        return np.ctypeslib.as_array(block.frames, (block.pictures, block.height, block.width, 3)).copy()

    def refuses(failed: bool, *words: bytes) -> None:
        message = library.inferix_error()
        assert failed and b"\n" not in message and all(word in message for word in words), message

    stream = ctypes.c_void_p(library.inferix_open(place, first, None, ctypes.c_uint64(4), 1))
    assert stream.value, library.inferix_error()
    saved, frames = f"{folder}/a.stream".encode(), []
    for index in range(6):
        if index == 2:
            assert library.inferix_act(stream, b"right") == 0
        if index == 3:
            assert library.inferix_prompt(stream, second) == 0
        if index == 4:
            assert library.inferix_save(stream, saved) == 0
            library.inferix_close(stream)
            stream = ctypes.c_void_p(library.inferix_restore(place, saved, 1))
            assert stream.value, library.inferix_error()
        frames.append(next_block(stream, index))
    np.save(f"{folder}/frames.npy", np.concatenate(frames))
    refuses(library.inferix_act(stream, b"fly") == -1, b"fly")
    refuses(library.inferix_prompt(stream, b"a\ndesert") == -1, b"desert")
    next_block(stream, 6)
    refuses(library.inferix_prompt(stream, None) == -1, b"prompt")
    refuses(library.inferix_act(None, b"left") == -1, b"stream")
    library.inferix_close(stream)
    library.inferix_close(None)
    refuses(not library.inferix_open(b"/none", b"", None, ctypes.c_uint64(0), 1), b"/none")


if __name__ == "__main__":
    main(*sys.argv[1:])
