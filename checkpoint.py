"""Checkpoints as files: read one, convert it to another published format, write one with random weights."""

from .export.checkpoint import convert, write_random
from .models.family import Checkpoint
from .models.registry import read_checkpoint

__all__ = ["Checkpoint", "convert", "read_checkpoint", "write_random"]
