"""Data files shipped with the package; README.md in this folder says where each comes from."""
