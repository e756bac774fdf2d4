"""Compression of whole networks, one method a file; the public names are exported by the package itself."""
