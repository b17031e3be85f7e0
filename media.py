"""Pictures and videos: read an image or a video as uint8 frames [T, H, W, 3], write frames as a video
or a contact sheet, feed streams to sinks.
"""

from .runtime.media import VideoWriter, contact_sheet
from .runtime.media_input import read_image, read_video, video_frames
from .runtime.sinks import Pump, Sink

__all__ = ["Pump", "Sink", "VideoWriter", "contact_sheet", "read_image", "read_video", "video_frames"]
