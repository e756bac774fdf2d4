"""The version of the package, where everything in it can read it; pyproject.toml states the same."""

__version__ = "0.1.0"
