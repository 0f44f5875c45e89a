"""Layers of multi-token prediction, which follow the others. Facts: docs/formats.md, "Multi-token prediction"."""

from dist_convert.models.blocks import HF
from dist_convert.models.schema import Key, column_parallel, norm, part

_MEGATRON = "mtp.layers.{mtp}"

PREDICTION = (
    norm(f"{_MEGATRON}.enorm.weight", part(f"{HF}.enorm.weight", "hidden")),
    norm(f"{_MEGATRON}.hnorm.weight", part(f"{HF}.hnorm.weight", "hidden")),
    column_parallel(f"{_MEGATRON}.eh_proj.weight", part(f"{HF}.eh_proj.weight", "hidden twice_hidden")),
    norm(f"{_MEGATRON}.final_layernorm.weight", part(f"{HF}.shared_head.norm.weight", "hidden")),
)
PREDICTION_COPIES = {
    "model.embed_tokens.weight": f"{HF}.embed_tokens.weight",
    "lm_head.weight": f"{HF}.shared_head.head.weight",
}
MTP_KEY = Key(
    "mtp_layers",
    "num_nextn_predict_layers",
    "mtp_num_layers",
    default=1,  # of transformers' classes, also where the files have none
    codec="if_any",
    aliases=("num_mtp_layers",),
)
