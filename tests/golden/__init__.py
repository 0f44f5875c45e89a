"""What conversions wrote when this was recorded: the sums of all weights files, and all that is said beside them.

`python -m tests.golden` records it anew. That belongs into a commit which names the behaviour that it changes.
"""
