"""See the package. The modes are read when transformers is imported."""

from enum import Enum

from torchvision import __getattr__  # noqa: F401


class InterpolationMode(Enum):
    """As torchvision names them."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"
