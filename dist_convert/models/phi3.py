"""Phi-3 and Phi-4: a Llama whose files have queries, keys and values in one tensor, and gate and up in another."""

from dataclasses import replace

from dist_convert.models import blocks
from dist_convert.models.mistral import MISTRAL
from dist_convert.models.schema import Alias, Family, Key, Pin, Row


def _in_one(row: Row, name: str) -> Row:
    """A row whose Hugging Face tensors lie in one, each behind the one before."""
    alias = Alias(name, rows=tuple(part.dims[0] for part in row.parts), is_published=True)
    return replace(row, parts=tuple(replace(p, alias=replace(alias, part=n)) for n, p in enumerate(row.parts)))


_GATE_UP, _, _DOWN, _ = blocks.MLP

PHI3 = Family(
    name="phi3",
    hf_class="Phi3ForCausalLM",
    # The defaults of Phi3Config in transformers 5.24.
    keys=(
        *blocks.dense_keys(query_groups=None, head_dim=None, epsilon=1e-5, theta=10000.0),
        Key("sliding_window", "sliding_window", "window_size", codec="window"),
    ),
    pins=(
        Pin("position_embedding_type", ("rope",), "transformers scales Phi-3 by LongRoPE alone", is_written=True),
        Pin("use_rope_scaling", (False, None), "transformers scales Phi-3 by LongRoPE alone"),
    ),
    excluded_args=MISTRAL.excluded_args,
    config={"pad_token_id": None, "resid_pdrop": 0.0, "embd_pdrop": 0.0},  # as in SmolLM3
    layer=(blocks.ATTENTION_NORM, _in_one(blocks.QKV, f"{blocks.HF}.self_attn.qkv_proj.weight"), blocks.OUTPUT),
    dense=(blocks.MLP_NORM, _in_one(_GATE_UP, f"{blocks.HF}.mlp.gate_up_proj.weight"), _DOWN),
    special_ids=(1, 32000),
    scalings=("default",),
)
