"""Makes targets: file headers, bytes at offsets, and the commit.

Where the file system refuses, everything here raises `TargetError`, or `NotEnoughSpace`.
"""
