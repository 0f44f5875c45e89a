"""The models that conversions are stopped over: small, and of both kinds and families."""

from __future__ import annotations

from pathlib import Path

from tests.checkpoints import Grid, Model, make
from tests.to_megatron import make_hf

LLAMA = Model(hidden=64, ffn=192, heads=8, groups=4, head_dim=8, layers=3, vocab=200, padded_vocab=256)
MIXTRAL = Model(hidden=64, ffn=96, heads=8, groups=4, head_dim=8, layers=2, vocab=99, padded_vocab=128, experts=4)


def make_small_sources(root: Path) -> Path:
    """A Llama as `megatron` at TP2 x PP3, and Hugging Face directories `llama` and `mixtral`, below a root."""
    make(root / "megatron", LLAMA, Grid(tp=2, pp=3))
    make_hf(root / "llama", LLAMA)
    make_hf(root / "mixtral", MIXTRAL)
    return root
