"""Model families: a table each, and the registry."""

from dist_convert.models.llama import LLAMA
from dist_convert.models.mistral import MISTRAL
from dist_convert.models.mixtral import MIXTRAL
from dist_convert.models.qwen import QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE

#: Training arguments may be those of several families: the first that they fit is taken.
FAMILIES = {family.name: family for family in (QWEN2, QWEN3, MISTRAL, LLAMA, QWEN2_MOE, QWEN3_MOE, MIXTRAL)}
