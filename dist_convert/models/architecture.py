"""The numbers that define a model, whichever format they were read from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's scaling of the rotary frequencies, transformers' `rope_type` "llama3"."""

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_max_positions: int


@dataclass(frozen=True)
class Architecture:
    """A decoder-only transformer with rotary embeddings, RMSNorm and gated MLPs or experts.

    `ffn` is the width of one MLP, or of one expert where `experts` > 0. `qkv_bias` says that the query, key and value
    projections have biases, `linear_bias` that the output projection and the MLP have them too.
    """

    family: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    query_groups: int
    head_dim: int
    vocab: int
    padded_vocab: int
    max_positions: int
    norm_epsilon: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    tied: bool = False
    qkv_bias: bool = False
    linear_bias: bool = False
    experts: int = 0
    experts_per_token: int = 0
    router_aux_loss: float = 0.0
    sliding_window: int | None = None

    def sizes(self) -> dict[str, int]:
        """The values of the size names that the tables in this package use."""
        return {
            "vocab": self.vocab,
            "padded_vocab": self.padded_vocab,
            "hidden": self.hidden,
            "ffn": self.ffn,
            "query_groups": self.query_groups,
            "query": self.heads * self.head_dim,
            "key_value": self.query_groups * self.head_dim,
            "experts": self.experts,
        }
