"""Acceptance of whole networks of other packages, and of the published ResNet-56: ``python -m bench.audit``."""
