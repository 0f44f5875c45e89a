"""SmolLM3: a Llama of which some layers have no rotary positions."""

from dist_convert.models import blocks
from dist_convert.models.schema import Family, Key

SMOLLM3 = Family(
    name="smollm3",
    hf_class="SmolLM3ForCausalLM",
    # The defaults of SmolLM3Config in transformers 5.24.
    keys=(
        *blocks.dense_keys(query_groups=4, head_dim=None, epsilon=1e-6, theta=2000000.0, tied=True),
        Key("layers_without_rope", "no_rope_layers", "no_rope_freq", codec="no_rope"),
    ),
    required_args=("no_rope_freq",),
    excluded_args=("add_qkv_bias", "window_size", "qk_layernorm"),
    config={"pad_token_id": None},  # otherwise a token that small vocabularies do not have
    config_pins={**blocks.NO_WINDOW, "attention_bias": False, "mlp_bias": False},
    layer=(blocks.ATTENTION_NORM, blocks.QKV, blocks.OUTPUT),
    dense=blocks.DENSE,
    special_ids=(128000, 128001),
)
