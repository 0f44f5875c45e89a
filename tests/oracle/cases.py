"""The models and grids for which the oracle writes checkpoints (imports neither torch nor megatron)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class OracleCase:
    """One model on one parallel grid; the defaults are a tiny Llama with grouped queries on one rank."""

    name: str
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    virtual_pipeline_parallel: int = 1
    expert_parallel: int = 1
    expert_tensor_parallel: int | None = None  # None: as many as tensor_parallel
    num_layers: int = 4
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None
    tied: bool = False
    qkv_bias: bool = False  # --add-qkv-bias
    linear_bias: bool = False  # --add-bias-linear: every linear layer has a bias, QKV too
    qk_layernorm: bool = False
    heads: int = 8
    query_groups: int = 4  # equal to heads: --group-query-attention is off
    kv_channels: int = 8
    hidden: int = 64
    ffn: int = 96
    vocab: int = 256
    make_vocab_size_divisible_by: int = 16
    experts: int | None = None
    top_k: int = 2
    grouped_gemm: bool = False  # the legacy GroupedMLP: mlp.experts.weight1 and weight2
    rotary_base: int = 10000
    use_rope_scaling: bool = False
    bf16: bool = False  # the file holds bf16; the logits are those of the same weights in fp32
    flat_storage: bool = False  # megatron's DDP: all parameters are views of one storage; with its optimizer
    fully_parallel: bool = False  # --ckpt-fully-parallel-save: data parallel ranks save parts of torch_dist
    sequence_length: int = 12

    @property
    def padded_vocab(self) -> int:
        """The vocabulary that Megatron-LM allocates."""
        multiple = self.make_vocab_size_divisible_by * self.tensor_parallel
        return -(-self.vocab // multiple) * multiple

    @property
    def etp(self) -> int:
        """The tensor parallel size of the experts."""
        return self.expert_tensor_parallel or self.tensor_parallel

    @property
    def grid(self) -> tuple[int, int, int, int, int]:
        """What decides the process groups: TP, PP, VP, EP, ETP."""
        return (
            self.tensor_parallel,
            self.pipeline_parallel,
            self.virtual_pipeline_parallel,
            self.expert_parallel,
            self.etp,
        )


def _mixtral(name: str, **fields: object) -> OracleCase:
    """A tiny Mixtral with four experts."""
    return OracleCase(name, **{"num_layers": 2, "experts": 4, **fields})  # type: ignore[arg-type]


CASES: tuple[OracleCase, ...] = (
    OracleCase("llama-tp1"),
    OracleCase("llama-mha", query_groups=8),
    OracleCase("llama-tied", tied=True),
    OracleCase("llama-rotary-base-500000", rotary_base=500_000),
    OracleCase("llama-rope-scaling", use_rope_scaling=True, kv_channels=16, sequence_length=256),
    OracleCase("llama-tp2-pp2", tensor_parallel=2, pipeline_parallel=2),
    OracleCase("llama-tp2-pp2-flat-storage", tensor_parallel=2, pipeline_parallel=2, flat_storage=True),
    OracleCase("llama-bf16", tensor_parallel=2, pipeline_parallel=2, bf16=True),
    OracleCase("llama-tied-tp2-pp2", tensor_parallel=2, pipeline_parallel=2, tied=True, fully_parallel=True),
    OracleCase("llama-mha-tp2-pp2", tensor_parallel=2, pipeline_parallel=2, query_groups=8),
    OracleCase("llama-tp2", tensor_parallel=2),
    OracleCase("llama-qkv-bias-tp2", tensor_parallel=2, qkv_bias=True),
    OracleCase("llama-linear-bias-tp2", tensor_parallel=2, linear_bias=True),
    OracleCase("llama-wide-heads-tp2", tensor_parallel=2, kv_channels=16),
    OracleCase("llama-tp4", tensor_parallel=4),
    OracleCase("llama-padded-vocab-tp4", tensor_parallel=4, vocab=509),
    # Rank 2 holds one true row and rank 3 none.
    OracleCase("llama-padding-rank-tp4", tensor_parallel=4, vocab=257, make_vocab_size_divisible_by=64),
    OracleCase("llama-groups2-tp4", tensor_parallel=4, query_groups=2),
    OracleCase("llama-tied-pp2", pipeline_parallel=2, tied=True),
    OracleCase("llama-pp4-uneven", pipeline_parallel=4, num_layers=8, first_stage_layers=1, last_stage_layers=3),
    OracleCase("llama-pp2-vpp2", pipeline_parallel=2, virtual_pipeline_parallel=2, num_layers=8),
    OracleCase("llama-tp2-pp2-vpp2", tensor_parallel=2, pipeline_parallel=2, virtual_pipeline_parallel=2),
    OracleCase("qwen3-tp2", tensor_parallel=2, qk_layernorm=True),
    _mixtral("mixtral-tp1"),
    _mixtral("mixtral-ep2", expert_parallel=2),
    _mixtral("mixtral-tp2-ep2", tensor_parallel=2, expert_parallel=2),
    _mixtral("mixtral-tp2-pp2-ep2", tensor_parallel=2, pipeline_parallel=2, expert_parallel=2),
    _mixtral(
        "mixtral-tp2-ep2-etp1",
        tensor_parallel=2,
        expert_parallel=2,
        expert_tensor_parallel=1,
        flat_storage=True,
        fully_parallel=True,
    ),
    _mixtral("mixtral-tp2-ep4-etp1", tensor_parallel=2, expert_parallel=4, expert_tensor_parallel=1, experts=8),
    _mixtral("mixtral-grouped-tp2-ep2", tensor_parallel=2, expert_parallel=2, grouped_gemm=True),
)

LOSSY_CASES: tuple[OracleCase, ...] = (
    # TP > EP * ETP: megatron-core below 0.18 never writes tensor parallel shards 2 and 3.
    _mixtral("mixtral-tp4-ep2-etp1", tensor_parallel=4, expert_parallel=2, expert_tensor_parallel=1),
)
