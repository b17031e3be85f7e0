"""Pictures and videos: read an image or a video as uint8 frames [T, H, W, 3], write frames as a video."""

from .runtime.media import VideoWriter
from .runtime.media_input import read_image, read_video, video_frames

__all__ = ["VideoWriter", "read_image", "read_video", "video_frames"]
