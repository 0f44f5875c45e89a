"""DeepSeek-V2-Lite: latent attention and shared experts; a router of softmax scores without groups."""

from dist_convert.models import blocks
from dist_convert.models.deepseek_v3 import LATENT_ATTENTION, LATENT_KEYS, LATENT_PINS, LATENT_SIZES
from dist_convert.models.schema import Family, Pin

DEEPSEEK_V2 = Family(
    name="deepseek_v2",
    hf_class="DeepseekV2ForCausalLM",
    # The defaults of DeepseekV2Config in transformers 5.24.
    keys=(
        *blocks.basic_keys(*LATENT_KEYS, epsilon=1e-6, theta=10000.0),
        *blocks.routed_keys(experts=64, per_token=1, ffn=1407, dense=0, shared=2, scale=1.0),
    ),
    pins=(
        *LATENT_PINS,
        Pin("moe_router_pre_softmax", (True,), "the family does not normalise the chosen weights", is_written=True),
    ),
    excluded_args=("moe_router_enable_expert_bias",),
    config_pins={
        "norm_topk_prob": False,
        "attention_bias": False,
        "mlp_bias": False,
        "scoring_func": "softmax",
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
    },
    reasons={
        "topk_method": "DeepSeek-V2 chooses groups of experts by the best score in each, Megatron by a sum of scores",
    },
    layer=LATENT_ATTENTION,
    dense=blocks.DENSE,
    moe=(blocks.MOE_NORM, blocks.ROUTER, *blocks.EXPERTS, *blocks.SHARED_EXPERTS),
    special_ids=(100000, 100001),
    products=(*LATENT_SIZES, blocks.SHARED_SIZE),
    scalings=("default", "yarn"),
)
