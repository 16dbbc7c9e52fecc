"""See the package."""

from torchvision import __getattr__  # noqa: F401
from torchvision.transforms.functional import InterpolationMode  # noqa: F401
