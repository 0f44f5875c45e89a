"""Makes targets: file headers, bytes at offsets, and the commit."""
