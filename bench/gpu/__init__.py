"""What is run on the day a GPU is at hand: ``make gpu-check``, ``make gpu-bench``, ``make gpu-probe``."""
