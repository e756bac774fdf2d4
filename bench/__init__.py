"""Benchmarks: ``python -m bench list|run|compare|report``; what is measured and why it is fair: docs/benchmarks.md."""
