"""The one place the version is written; pyproject.toml and the native module read it from here."""

__version__ = "0.1.0"
