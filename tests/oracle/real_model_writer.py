"""Put a real Llama into megatron-core on a TP3 x PP2 grid, let it answer, save a checkpoint.

    torchrun --nproc-per-node 6 real_model_writer.py HF_DIR TARGET

writes TARGET in Megatron-LM's `torch` format. The weights are cut for Megatron's own load_state_dict(strict=True), by
code that knows nothing of the converter. It runs on the CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import random
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from real_model_args import training_args

QUESTION = "What is the capital of France?"
TP, PP = 3, 2
ITERATION = 1
ANSWER_TOKENS = 10


def main() -> None:
    """This rank's part of it all."""
    hf_dir, target = (Path(argument).resolve() for argument in sys.argv[1:])
    hf = json.loads((hf_dir / "config.json").read_text())
    start_megatron_on_cpu()
    tp_rank, pp_rank = dist.get_rank() % TP, dist.get_rank() // TP
    model = build_model(hf, pp_rank).eval()
    model.load_state_dict(cut_weights(hf_dir, hf, tp_rank, pp_rank), strict=True)
    answer(model, hf_dir, pp_rank)
    args = training_args(hf, tp=TP, pp=PP, iteration=ITERATION, tokenizer=hf_dir, save=target)
    save_checkpoint(model.bfloat16(), args, target, tp_rank, pp_rank)
    dist.destroy_process_group()


def start_megatron_on_cpu() -> None:
    """Start torch.distributed and megatron-core's groups, with its calls to CUDA replaced."""
    warnings.filterwarnings("ignore", module=r"megatron|torch\.distributed")
    logging.disable(logging.WARNING)  # that there is no CUDA, six times
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    CudaRNGStatesTracker.fork = lambda self, name=None: contextlib.nullcontext()
    dist.init_process_group("gloo")
    if dist.get_world_size() != TP * PP:
        sys.exit(f"the grid is TP{TP} x PP{PP}: start {TP * PP} ranks, not {dist.get_world_size()}")
    parallel_state.initialize_model_parallel(TP, PP)


def build_model(hf: dict[str, Any], pp_rank: int) -> Any:
    """This rank's part of a GPTModel, in float32 (see `answer`), its weights not yet set."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=hf["num_hidden_layers"],
        hidden_size=hf["hidden_size"],
        num_attention_heads=hf["num_attention_heads"],
        num_query_groups=hf["num_key_value_heads"],
        kv_channels=hf["head_dim"],
        ffn_hidden_size=hf["intermediate_size"],
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        layernorm_epsilon=hf["rms_norm_eps"],
        tensor_model_parallel_size=TP,
        pipeline_model_parallel_size=PP,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        perform_initialization=False,
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=hf["vocab_size"],
        max_sequence_length=hf["max_position_embeddings"],
        position_embedding_type="rope",
        rotary_base=int(hf["rope_parameters"]["rope_theta"]),
        share_embeddings_and_output_weights=hf["tie_word_embeddings"],
        parallel_output=False,
        pre_process=pp_rank == 0,
        post_process=pp_rank == PP - 1,
    )


def cut_weights(hf_dir: Path, hf: dict[str, Any], tp_rank: int, pp_rank: int) -> dict[str, torch.Tensor]:
    """This rank's part of the Hugging Face weights, under Megatron's names."""
    from safetensors import safe_open

    groups, layers = hf["num_key_value_heads"] // TP, hf["num_hidden_layers"] // PP
    state: dict[str, torch.Tensor] = {}
    with safe_open(hf_dir / "model.safetensors", "pt") as weights:

        def whole(name: str) -> torch.Tensor:
            tensor: torch.Tensor = weights.get_tensor(f"model.{name}.weight")
            return tensor

        def part(name: str, dim: int = 0) -> torch.Tensor:
            return whole(name).chunk(TP, dim)[tp_rank]

        for layer in range(layers):
            megatron, llama = f"decoder.layers.{layer}", f"layers.{pp_rank * layers + layer}"
            # Rows come by query group: its query heads, its key head, its value head.
            q, k, v = (part(f"{llama}.self_attn.{name}_proj").unflatten(0, (groups, -1)) for name in "qkv")
            gate, up = part(f"{llama}.mlp.gate_proj"), part(f"{llama}.mlp.up_proj")
            state |= {
                f"{megatron}.input_layernorm.weight": whole(f"{llama}.input_layernorm"),
                f"{megatron}.self_attention.linear_qkv.weight": torch.cat([q, k, v], dim=1).flatten(0, 1),
                f"{megatron}.self_attention.linear_proj.weight": part(f"{llama}.self_attn.o_proj", dim=1),
                f"{megatron}.pre_mlp_layernorm.weight": whole(f"{llama}.post_attention_layernorm"),
                f"{megatron}.mlp.linear_fc1.weight": torch.cat([gate, up]),
                f"{megatron}.mlp.linear_fc2.weight": part(f"{llama}.mlp.down_proj", dim=1),
            }
        if pp_rank == 0:
            state["embedding.word_embeddings.weight"] = part("embed_tokens")
        if pp_rank == PP - 1:
            state["decoder.final_layernorm.weight"] = whole("norm")
            state["output_layer.weight"] = part("embed_tokens")  # tied: an equal copy
    return state


@torch.inference_mode()
def answer(model: Any, hf_dir: Path, pp_rank: int) -> None:
    """Let the Megatron model answer QUESTION greedily, through the pipeline; rank 0 prints it.

    In float32: the two best first tokens are 0.1 apart, which bf16 cannot tell from a tie.
    """
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(hf_dir)
    chat = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    tokens = torch.tensor([prompt])
    for _ in range(ANSWER_TOKENS):
        length = tokens.shape[1]
        mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
        if pp_rank > 0:
            hidden = torch.empty(length, 1, model.config.hidden_size)
            dist.recv(hidden, dist.get_rank() - TP)
            model.set_input_tensor(hidden)
        output = model(tokens, torch.arange(length)[None], mask)
        if pp_rank < PP - 1:
            dist.send(output, dist.get_rank() + TP)
        chosen = output[:, -1:].argmax(-1) if pp_rank == PP - 1 else torch.empty(1, 1, dtype=torch.long)
        dist.broadcast(chosen, TP * PP - 1)
        tokens = torch.cat([tokens, chosen], dim=1)
        if chosen.item() == tokenizer.eos_token_id:
            break
    if dist.get_rank() == 0:
        print(f"{QUESTION}\n{tokenizer.decode(tokens[0, len(prompt) :], skip_special_tokens=True)}", flush=True)


def save_checkpoint(model: Any, args: argparse.Namespace, root: Path, tp_rank: int, pp_rank: int) -> None:
    """Write this rank's file as Megatron-LM does; the tracker file comes last."""
    import numpy

    cuda_state = torch.zeros(16, dtype=torch.uint8)  # stands for the state of a generator that is not here
    rng_state = {
        "random_rng_state": random.getstate(),
        "np_rng_state": numpy.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": cuda_state,
        "rng_tracker_states": {"model-parallel-rng": cuda_state.clone()},
    }
    checkpoint = {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": ITERATION,
        "model": model.state_dict_for_save_checkpoint(),
        "rng_state": [rng_state],
    }
    folder = root / f"iter_{ITERATION:07d}" / f"mp_rank_{tp_rank:02d}_{pp_rank:03d}"
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, folder / "model_optim_rng.pt")
    dist.barrier()
    if dist.get_rank() == 0:
        (root / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))


if __name__ == "__main__":  # megatron-core starts processes by spawn
    main()
