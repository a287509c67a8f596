"""The version, for modules that must not import the façade."""

from typing import Final

__version__: Final = "0.1.0"
