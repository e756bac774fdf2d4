"""The demo, and what the other commands share with it: networks, images, timing, tables."""
