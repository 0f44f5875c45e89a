"""Which models are converted at which grids, in which formats and spellings.

CASES are few: each model once in either direction. All pairs of a grid, a format and a kind of modules (spelling and
layout of experts) occur in each direction, with some dense model and with some model of experts, as far as they are
among FULL_CASES. These are all, for each model.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from tests.checkpoints import Grid
from tests.oracle.families.models import MODELS, TinyModel

FILE = "model_optim_rng.pt"


@dataclass(frozen=True)
class Case:
    """A model as a Megatron checkpoint.

    Attributes:
        model: what it is.
        grid: how it is cut.
        format: torch or torch_dist.
        spelling: transformer_impl of the training: local or transformer_engine.
        experts: sequential or te-grouped.
    """

    model: TinyModel
    grid: Grid
    format: str
    spelling: str
    experts: str = "sequential"

    @property
    def name(self) -> str:
        """Of its directory, and of the test."""
        sizes = {"tp": self.grid.tp, "pp": self.grid.pp, "ep": self.grid.ep, "etp": self.grid.etp or 1}
        grid = "-".join(f"{axis}{size}" for axis, size in sizes.items() if size > 1)
        spelling = "te" if self.spelling == "transformer_engine" else "local"
        return f"{self.model.name}-{grid}-{self.format}-{spelling}" + "-grouped" * (self.experts == "te-grouped")

    @property
    def layout(self) -> str | None:
        """Of the pipeline, where it is not even."""
        return self.model.layout or None if self.grid.pp == 2 else None

    @property
    def flags(self) -> list[str]:
        """Of a conversion that writes it."""
        sizes = {"tensor": self.grid.tp, "pipeline": self.grid.pp, "expert": self.grid.ep}
        sizes |= {"expert-tensor": self.grid.etp or self.grid.tp}
        grid = [word for axis, size in sizes.items() for word in (f"--target-{axis}-parallel-size", str(size))]
        grid += ["--pipeline-model-parallel-layout", self.layout] if self.layout else []
        return [*grid, "--saver-transformer-impl", self.spelling, "--expert-layout", self.experts]


#: What the arguments of a checkpoint do not tell, as a user says it; {hf} is a directory with the model's config.json.
SAID = {
    "mistral": ("--like", "{hf}"),
    "seed-oss": ("--like", "{hf}"),
    "phi3": ("--like", "{hf}"),
    "llama32": ("--rope-scaling-factor", "32"),
    "glm45": ("--like", "{hf}"),
}

_BY_NAME = {model.name: model for model in MODELS}
_TP, _TP_PP, _ALL = Grid(tp=2), Grid(tp=2, pp=2), Grid(tp=2, pp=2, ep=2, etp=1)
_TP_EP = Grid(tp=2, ep=2, etp=1)
_LOCAL, _TE = ("local", "sequential"), ("transformer_engine", "sequential")
_GROUPED = ("transformer_engine", "te-grouped")


def _case(name: str, grid: Grid, format: str, modules: tuple[str, str]) -> Case:
    return Case(_BY_NAME[name], grid, format, *modules)


#: Hugging Face -> Megatron.
TO_MEGATRON: tuple[Case, ...] = (
    _case("llama32", _TP_PP, "torch_dist", _LOCAL),
    _case("qwen2", _TP, "torch_dist", _TE),
    _case("qwen2-tied", _TP_PP, "torch", _LOCAL),
    _case("mistral", _TP, "torch", _LOCAL),
    _case("mistral-window", _TP_PP, "torch", _TE),
    _case("qwen3", _TP_PP, "torch_dist", _TE),
    _case("qwen3-tied", _TP, "torch", _LOCAL),
    _case("mixtral", _TP_EP, "torch_dist", _LOCAL),
    _case("qwen3-moe", _TP_EP, "torch", _GROUPED),
    _case("qwen3-moe-mixed", _TP, "torch", _TE),
    _case("qwen2-moe", _TP, "torch_dist", _GROUPED),
    _case("deepseek-v3", _ALL, "torch_dist", _GROUPED),
    _case("deepseek-v3-yarn", _TP_PP, "torch", _TE),
    _case("moonlight", _TP, "torch", _LOCAL),
    _case("deepseek-v2-lite", _ALL, "torch", _LOCAL),
    _case("glm45", _TP_PP, "torch_dist", _LOCAL),
    _case("seed-oss", _TP, "torch", _TE),
    _case("gpt-oss", _ALL, "torch_dist", _GROUPED),
    _case("phi3", _TP, "torch_dist", _TE),
    _case("smollm3", _TP_PP, "torch", _TE),
    _case("qwen3-yarn", _TP, "torch", _LOCAL),
    _case("deepseek-v3-mtp", _TP_PP, "torch", _TE),
    _case("glm45-mtp", _ALL, "torch_dist", _TE),
    _case("glm45-two-mtp", _TP_PP, "torch", _GROUPED),
    _case("glm45-tied-mtp", _TP_EP, "torch", _TE),
)
#: Megatron -> Hugging Face.
TO_HUGGINGFACE: tuple[Case, ...] = (
    _case("llama32", _TP_PP, "torch", _TE),
    _case("qwen2", _TP, "torch", _TE),
    _case("qwen2-tied", _TP_PP, "torch_dist", _TE),
    _case("mistral", _TP_PP, "torch_dist", _LOCAL),
    _case("mistral-window", _TP, "torch_dist", _LOCAL),
    _case("qwen3", _TP_PP, "torch", _LOCAL),
    _case("qwen3-tied", _TP_PP, "torch_dist", _TE),
    _case("mixtral", _TP_EP, "torch", _GROUPED),
    _case("qwen3-moe", _TP_PP, "torch_dist", _LOCAL),
    _case("qwen3-moe-mixed", _ALL, "torch_dist", _GROUPED),
    _case("qwen2-moe", _ALL, "torch", _LOCAL),
    _case("deepseek-v3", _TP_PP, "torch", _TE),
    _case("deepseek-v3-yarn", _TP, "torch_dist", _TE),
    _case("moonlight", _ALL, "torch_dist", _TE),
    _case("deepseek-v2-lite", _TP, "torch_dist", _LOCAL),
    _case("glm45", _TP, "torch", _GROUPED),
    _case("seed-oss", _TP_PP, "torch_dist", _TE),
    _case("gpt-oss", _TP_EP, "torch", _LOCAL),
    _case("phi3", _TP_PP, "torch", _LOCAL),
    _case("smollm3", _TP, "torch_dist", _LOCAL),
    _case("qwen3-yarn", _TP_PP, "torch_dist", _TE),
    _case("deepseek-v3-mtp", _TP_PP, "torch_dist", _GROUPED),
    _case("glm45-mtp", _TP_PP, "torch", _LOCAL),
    _case("glm45-two-mtp", _TP_PP, "torch_dist", _TE),
    _case("glm45-tied-mtp", _TP_EP, "torch_dist", _TE),
)
CASES = tuple(dict.fromkeys((*TO_MEGATRON, *TO_HUGGINGFACE)))


#: What others show by default.
_NOT_BY_DEFAULT = ("mixtral-yarn", "qwen2-moe-yarn")


def _all() -> tuple[Case, ...]:
    models = dict.fromkeys((*(case.model for case in CASES), *(_BY_NAME[name] for name in _NOT_BY_DEFAULT)))
    dense = product((_TP, _TP_PP), ("torch", "torch_dist"), (_LOCAL, _TE))
    moe = product((_TP, _TP_PP, _ALL), ("torch", "torch_dist"), (_LOCAL, _TE, _GROUPED))
    uncut = product((_TP_EP, _ALL), ("torch", "torch_dist"), (_LOCAL, _TE, _GROUPED))  # experts that have biases
    one_stage = product((_TP, _TP_EP), ("torch", "torch_dist"), (_LOCAL, _TE, _GROUPED))
    combinations = {"dense": tuple(dense), "moe": tuple(moe), "gpt-oss": tuple(uncut), "tied": tuple(one_stage)}
    kinds = {model: "moe" if model.has_experts else "dense" for model in models}
    kinds |= {_BY_NAME["gpt-oss"]: "gpt-oss", _BY_NAME["glm45-tied-mtp"]: "tied"}
    return tuple(
        Case(model, grid, format, *modules) for model in models for grid, format, modules in combinations[kinds[model]]
    )


FULL_CASES = _all()
