"""Image data sets, event recordings, and encoders that add the time axis."""

from .archives import ArchiveError
from .device_loader import DeviceLoader
from .encoding import DirectEncoder, PoissonEncoder
from .events import EventData, EventFrames, RecordingError, collate
from .events import load as load_events
from .frames import Augment, Framing
from .images import ImageData, Images, load, stratified_split, transforms

__all__ = [
    "ArchiveError",
    "Augment",
    "DeviceLoader",
    "DirectEncoder",
    "EventData",
    "EventFrames",
    "Framing",
    "ImageData",
    "Images",
    "PoissonEncoder",
    "RecordingError",
    "collate",
    "load",
    "load_events",
    "stratified_split",
    "transforms",
]
