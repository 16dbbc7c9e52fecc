"""See the package."""

from torchvision import __getattr__  # noqa: F401
