"""Model families: a table each, and the registry."""

from dist_convert.models.deepseek_v3 import DEEPSEEK_V3
from dist_convert.models.glm4_moe import GLM4_MOE
from dist_convert.models.llama import LLAMA
from dist_convert.models.mistral import MISTRAL
from dist_convert.models.mixtral import MIXTRAL
from dist_convert.models.qwen2 import QWEN2
from dist_convert.models.qwen2_moe import QWEN2_MOE
from dist_convert.models.qwen3 import QWEN3
from dist_convert.models.qwen3_moe import QWEN3_MOE

#: Training arguments may be those of several families: the first that they fit is taken.
FAMILIES = {
    family.name: family
    for family in (QWEN2, QWEN3, MISTRAL, LLAMA, QWEN2_MOE, QWEN3_MOE, DEEPSEEK_V3, GLM4_MOE, MIXTRAL)
}
