"""Pictures and clips in and out: reading, fitting to a model's size and back, writing.

Reading takes whatever a user has (a file, a PIL image, a NumPy array, a tensor). Sizes are
(width, height) in pixels throughout, as in PIL; tensors are (channels, height, width), those of
clips (channels, frames, height, width). Torch is imported only by the functions that give tensors.
"""

from .clips import ANIMATED, Clip, fit_clip, is_clip, read_clip, save_clip
from .decoding import MAX_PIXELS, MAX_SIDE, READABLE, Limits, Pathlike, PictureWarning, Size
from .fitting import Box, Placement, canvas_size, fit
from .reading import Picture, read_image, read_picture, read_upload
from .tensors import to_clip, to_image, to_tensor
from .writing import (
    RECORD_KEY,
    WRITABLE,
    atomic_write,
    check_writable,
    plain,
    png_bytes,
    read_record,
    save_image,
    save_json,
)

__all__ = [
    "ANIMATED",
    "MAX_PIXELS",
    "MAX_SIDE",
    "READABLE",
    "RECORD_KEY",
    "WRITABLE",
    "Box",
    "Clip",
    "Limits",
    "Pathlike",
    "Picture",
    "PictureWarning",
    "Placement",
    "Size",
    "atomic_write",
    "canvas_size",
    "check_writable",
    "fit",
    "fit_clip",
    "is_clip",
    "plain",
    "png_bytes",
    "read_clip",
    "read_image",
    "read_picture",
    "read_record",
    "read_upload",
    "save_clip",
    "save_image",
    "save_json",
    "to_clip",
    "to_image",
    "to_tensor",
]
