"""Meta's names of a Llama's weights; Mistral's own files and torchtitan have them, too.

Facts: docs/formats.md, "Meta's files".
"""

from dist_convert.models.blocks import HF

_META = "layers.{layer}"

#: What the tables call a Hugging Face tensor -> Meta's name of it.
NAMES = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    f"{HF}.input_layernorm.weight": f"{_META}.attention_norm.weight",
    f"{HF}.self_attn.q_proj.weight": f"{_META}.attention.wq.weight",
    f"{HF}.self_attn.k_proj.weight": f"{_META}.attention.wk.weight",
    f"{HF}.self_attn.v_proj.weight": f"{_META}.attention.wv.weight",
    f"{HF}.self_attn.o_proj.weight": f"{_META}.attention.wo.weight",
    f"{HF}.post_attention_layernorm.weight": f"{_META}.ffn_norm.weight",
    f"{HF}.mlp.gate_proj.weight": f"{_META}.feed_forward.w1.weight",
    f"{HF}.mlp.up_proj.weight": f"{_META}.feed_forward.w3.weight",
    f"{HF}.mlp.down_proj.weight": f"{_META}.feed_forward.w2.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
}
EMBEDDING, HEAD = NAMES["model.embed_tokens.weight"], NAMES["lm_head.weight"]
#: Of the first layer, which tells what a head and the MLP have.
QUERY, GATE = "layers.0.attention.wq.weight", "layers.0.feed_forward.w1.weight"
#: Those whose heads' rows are in another order, see `models.catalog.from_neighbours`.
ROTATED = frozenset((f"{HF}.self_attn.q_proj.weight", f"{HF}.self_attn.k_proj.weight"))
#: No weights: what the positions and the sizes tell.
DROPPED = "rope.freqs"
