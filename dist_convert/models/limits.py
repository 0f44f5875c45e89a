"""Sizes that no model has: a file that claims them is damaged or hostile, and planning it would take all memory."""

from __future__ import annotations

from dist_convert.errors import UnsupportedModel

MOST_LAYERS = MOST_EXPERTS = 10_000
#: Layers times experts; the largest models have a tenth of it.
MOST_EXPERTS_OF_ALL_LAYERS = 1 << 18
#: Rank directories of one checkpoint.
MOST_RANKS = 1 << 17
#: Of anything else, such as the width or the vocabulary.
MOST = 1 << 40


def is_size(value: object, most: int = MOST) -> bool:
    """Whether a value from a file is a whole number that a model can have; 0 and None stand for its absence."""
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most)


def is_number(value: object) -> bool:
    """Whether a value from a file is a number, and neither infinite nor too large to compute with."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300


def check_experts(layers: int, experts: int, file: str) -> None:
    """Refuse more experts than can be planned.

    Raises:
        UnsupportedModel
    """
    if layers * experts > MOST_EXPERTS_OF_ALL_LAYERS:
        raise UnsupportedModel(
            "a model of impossible sizes",
            file=file,
            expected=f"at most {MOST_EXPERTS_OF_ALL_LAYERS} experts in all layers together",
            found=f"{experts} in each of {layers} layers",
            remedy="the file is damaged; take it anew from where it came from",
        )
