"""Ranks among each other: their world and its collectives, what they say beside those, how they are started."""
