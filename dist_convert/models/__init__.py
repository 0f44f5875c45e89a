"""Model families: a table each, the registry, and what is known not to be convertible."""

from dist_convert.models.deepseek_v2 import DEEPSEEK_V2
from dist_convert.models.deepseek_v3 import DEEPSEEK_V3
from dist_convert.models.glm4_moe import GLM4_MOE
from dist_convert.models.gpt_oss import GPT_OSS
from dist_convert.models.llama import LLAMA
from dist_convert.models.mistral import MISTRAL
from dist_convert.models.mixtral import MIXTRAL
from dist_convert.models.phi3 import PHI3
from dist_convert.models.qwen2 import QWEN2
from dist_convert.models.qwen2_moe import QWEN2_MOE
from dist_convert.models.qwen3 import QWEN3
from dist_convert.models.qwen3_moe import QWEN3_MOE
from dist_convert.models.schema import Family
from dist_convert.models.seed_oss import SEED_OSS
from dist_convert.models.smollm3 import SMOLLM3

_DENSE = (LLAMA, MISTRAL, QWEN2, SEED_OSS, QWEN3, PHI3, SMOLLM3)
_MOE = (MIXTRAL, QWEN2_MOE, QWEN3_MOE, DEEPSEEK_V3, DEEPSEEK_V2, GLM4_MOE, GPT_OSS)
#: Training arguments may be those of several families: the first that they fit is taken.
FAMILIES: dict[str, Family] = {family.name: family for family in (*_DENSE, *_MOE)}

_AS_LLAMA = "saved as a llama, it converts"
#: Values of `model_type` that people ask for, and what Megatron's models or this table lack for them.
REFUSED = {
    "olmo2": "its norms come after attention and MLP, and normalise queries and keys over all heads",
    "olmoe": "its norms of queries and keys go over all heads",
    "qwen3_next": "most of its layers have linear attention",
    **dict.fromkeys(
        ("gemma2", "gemma3", "gemma3_text"), "its layers have four norms, and its embedding and logits are scaled"
    ),
    "internlm": f"its attention may have biases where its MLP has none; without, {_AS_LLAMA}",
    "internlm2": f"its queries, keys and values are one tensor (wqkv) in an order of its own; {_AS_LLAMA}",
    "internlm3": f"its published models scale rotary positions dynamically; without, {_AS_LLAMA}",
    **dict.fromkeys(("granite", "granitemoe"), "its embedding, attention, residuals and logits have multipliers"),
}
#: Of those with a `vision_config`.
WITH_VISION = "it has a vision tower beside its language model; save the language model alone, and convert that"
