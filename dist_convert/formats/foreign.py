"""Checkpoints of other programs, and parts of one: each is known by name, with what to do about it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from dist_convert.errors import CheckpointNotFound, UnsupportedModel
from dist_convert.formats.huggingface.read import CONFIG_FILE, WEIGHTS_KINDS
from dist_convert.formats.megatron.grid import is_rank_directory
from dist_convert.formats.megatron.iterations import is_checkpoint, is_distributed, rank_files
from dist_convert.formats.meta.params import weights_files
from dist_convert.records import counted, names


@dataclass(frozen=True)
class Foreign:
    """A kind of checkpoint that is not read.

    Attributes:
        name: what it is.
        signs: what tells it, each of them alone: patterns of files below a directory, or parts of tensors' names.
        remedy: what to do about it.
    """

    name: str
    signs: tuple[str, ...]
    remedy: str


#: By their files. Sources: docs/formats.md, "Formats that are refused by name".
DIRECTORIES = (
    Foreign(
        "a DeepSpeed checkpoint, of Megatron-DeepSpeed or GPT-NeoX",
        ("*mp_rank_*_states.pt", "*/*mp_rank_*_states.pt", "layer_*-model_*states.pt", "*/layer_*-model_*states.pt"),
        "convert it with the program that saved it, to Hugging Face or Megatron: Megatron-DeepSpeed has "
        "tools/convert_checkpoint, GPT-NeoX has tools/ckpts/convert_neox_to_hf.py; then give the result",
    ),
    Foreign(
        "a NeMo checkpoint",
        ("*.nemo", "context/model.yaml", "model_weights/metadata.json", "weights/common.pt",
         "model_weights.ckpt", "*/model_weights.ckpt"),
        "export it with NeMo (llm.export_ckpt with target='hf'), then give the result",
    ),
    Foreign(
        "a nanotron checkpoint",
        ("checkpoint_metadata.json", "*/checkpoint_metadata.json", "model/model", "*/model/model"),
        "convert it with nanotron's examples/llama/convert_nanotron_to_hf.py, then give the result",
    ),
    Foreign(
        "weights in Meta's or Mistral's own files, without params.json or in several safetensors files",
        ("consolidated.*.pth", "consolidated*.safetensors"),
        "copy the model's params.json beside them; convert several safetensors files with transformers' "
        "convert_mistral_weights_to_hf.py, then give the result",
    ),
    Foreign(
        "a LoRA adapter without its model (PEFT)",
        ("adapter_config.json",),
        "load model and adapter with PEFT, merge them with merge_and_unload(), save_pretrained, then give the result",
    ),
    Foreign(
        "a GGUF file with quantised weights",
        ("*.gguf",),
        "give the model it was made from; or load it with transformers (gguf_file=...), which dequantises it, and "
        "save_pretrained",
    ),
    Foreign(
        "a diffusers pipeline: several models, none of them a language model",
        ("model_index.json",),
        "give the directory of one language model, such as a Llama",
    ),
    Foreign(
        "a distributed checkpoint of the format zarr",
        ("*/.zarray",),
        "load it with the Megatron-LM that saved it, and save it with --ckpt-format torch_dist",
    ),
    Foreign(
        "weights of a framework other than PyTorch: MLX, ONNX, TensorFlow, Flax or OpenVINO",
        ("weights*.npz", "weights.*.safetensors", "*.onnx", "onnx/*.onnx", "tf_model*.h5", "flax_model*.msgpack",
         "openvino_model*.bin"),
        "give the model it was made from, with its model*.safetensors or pytorch_model*.bin",
    ),
    Foreign(
        "rank directories with model_rng.pt, as Megatron-LM of 2022 and 2023 saved with a distributed optimizer",
        ("mp_rank_*/model_rng.pt",),
        "they hold what model_optim_rng.pt holds: make a directory with links of that name to them, one in each "
        "mp_rank_*, and give that",
    ),
)  # fmt: skip

#: By the names of their tensors.
TENSORS = (
    Foreign(
        "a LoRA adapter that is not merged into the model",
        (".adapter.linear_", ".adapter_layer.", ".to_wrap.", ".base_layer.", "lora_"),
        "merge it where it was trained (Megatron-Bridge and NeMo: their merge of LoRA; PEFT: merge_and_unload(); "
        "ms-swift: --merge_lora true), save the model, then give the result",
    ),
    Foreign(
        "weights quantised by GPTQ, AWQ or MLX",
        (".qweight", ".qzeros", ".biases"),
        "give the model they were made from; or load it dequantised, save it in bfloat16, and give that",
    ),
)


def refuse_foreign(path: Path) -> None:
    """Refuse a path that holds a kind of checkpoint that is not read, or only a part of one.

    Raises:
        UnsupportedModel: a checkpoint of another program.
        CheckpointNotFound: the directory or file of one rank.
    """
    is_file = path.is_file()
    directory = (path.parent if is_file else path).absolute()
    if is_rank_directory(directory.name) and (is_file or not is_checkpoint(directory)) and directory.is_dir():
        expected = "the checkpoint's root or one of its iterations, with the directories of all ranks"
        raise CheckpointNotFound("one rank's part of a checkpoint", path, expected, remedy=f"give {directory.parent}")
    if not directory.is_dir() or (not is_file and _is_read(directory)):
        return
    for foreign in DIRECTORIES:
        matches = ([path] * path.match(sign) if is_file else directory.glob(sign) for sign in foreign.signs)
        if found := sorted(map(str, chain.from_iterable(matches))):
            raise UnsupportedModel(f"not read: {foreign.name}", found[0], remedy=foreign.remedy)


def _is_read(directory: Path) -> bool:
    """Whether a directory itself holds weights of a format that is read, whatever lies beside them."""
    weights = [name for kind in WEIGHTS_KINDS for name in kind]
    has_weights = (directory / CONFIG_FILE).is_file() and any((directory / name).is_file() for name in weights)
    return has_weights or bool(rank_files(directory) or weights_files(directory)) or is_distributed(directory)


def notes_on_classes(classes: Sequence[str]) -> tuple[str, ...]:
    """A note on classes of other packages in the pickles."""
    return (f"not imported, and no tensor or argument needs them: {names(classes)}",) if classes else ()


def refuse_foreign_tensors(names_of: Mapping[str, Iterable[str]], directory: Path) -> None:
    """Refuse a model whose tensors' names, of each file in a directory, show that it is of a kind that is not read.

    Raises:
        UnsupportedModel: naming the kind, and what to do.
    """
    for foreign in TENSORS:
        named = ((file, name) for file, listed in names_of.items() for name in listed)
        if found := [(file, name) for file, name in named if any(sign in name for sign in foreign.signs)]:
            (file, name), many = min(found), counted(len(found), "such name")
            what = f"not read: {foreign.name}"
            raise UnsupportedModel(what, directory / file, tensor=name, found=many, remedy=foreign.remedy)
