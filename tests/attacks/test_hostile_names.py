"""Names and texts that want to move a terminal's cursor or to look like our own lines: each is printed as one line."""

from __future__ import annotations
