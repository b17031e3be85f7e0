"""Pictures and videos: read an image or a video as uint8 frames [T, H, W, 3], write frames as a video."""

from .runtime.media import VideoWriter, read_image, read_video

__all__ = ["VideoWriter", "read_image", "read_video"]
