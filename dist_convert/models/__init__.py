"""Model families: one table each, and the registry."""

from dist_convert.models.llama import LLAMA
from dist_convert.models.mixtral import MIXTRAL

FAMILIES = {family.name: family for family in (LLAMA, MIXTRAL)}
