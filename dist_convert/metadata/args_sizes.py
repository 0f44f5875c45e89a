"""Training arguments that no model was trained with, because they are damaged or made to take all memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dist_convert.errors import UnsupportedModel, raise_together
from dist_convert.models.limits import MOST, MOST_EXPERTS, MOST_LAYERS, check_experts, is_number, is_size

#: Arguments that are computed with, and what they are at most.
_SIZES = {"num_layers": MOST_LAYERS, "num_experts": MOST_EXPERTS} | dict.fromkeys(
    ("hidden_size", "ffn_hidden_size", "moe_ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
     "max_position_embeddings", "padded_vocab_size", "vocab_size", "moe_router_topk"), MOST,
)  # fmt: skip
_NUMBERS = ("norm_epsilon", "layernorm_epsilon", "rotary_base")


def check_sizes(args: Mapping[str, Any], file: str) -> None:
    """Refuse arguments that are no numbers of a model, before anything is computed with them.

    Raises:
        Problems, or the one problem there is: UnsupportedModel.
    """
    wrong = {name: f"a whole number up to {most}" for name, most in _SIZES.items() if not is_size(args.get(name), most)}
    wrong |= {name: "a number" for name in _NUMBERS if args.get(name) is not None and not is_number(args[name])}
    coefficient = args.get("moe_aux_loss_coeff")  # a list has one for each kind of balancing
    if coefficient is not None and not all(
        map(is_number, coefficient if isinstance(coefficient, list) else [coefficient])
    ):
        wrong["moe_aux_loss_coeff"] = "a number, or several"
    raise_together(
        [
            UnsupportedModel(
                f"the argument {name} is no size of a model",
                file=file,
                expected=expected,
                found=repr(args[name])[:80],
                remedy="the file is damaged; copy it again from where it was saved",
            )
            for name, expected in wrong.items()
        ]
    )
    check_experts(args.get("num_layers") or 0, args.get("num_experts") or 0, file)
