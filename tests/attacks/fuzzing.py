"""Damages valid files in every reader's format and reads them again: an error of ours is the answer, or a value.

As a program it does that for as long as it is told: `python -m tests.attacks.fuzzing --seconds 3600`. Every round is a
search by hypothesis from a new seed; what it finds is shown with the smallest damage that does it.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import resource
import shutil
import tempfile
import time
import zipfile
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from dist_convert.errors import ConversionError, CorruptFile
from dist_convert.formats.huggingface.config import architecture_from_config, config_json
from dist_convert.formats.huggingface.open import configs_of
from dist_convert.formats.huggingface.quantised import quantisation_of, with_scales
from dist_convert.formats.huggingface.read import read_index_file, read_safetensors_shard, read_weights_header
from dist_convert.formats.megatron.args import architecture_from_args, true_vocab
from dist_convert.formats.megatron.grid import grid_from_args
from dist_convert.formats.meta.params import args_of_params
from dist_convert.formats.open import open_checkpoint
from dist_convert.formats.tokenizer.huggingface import read_huggingface
from dist_convert.formats.torch.shards import read_shard, shard_to_json
from dist_convert.formats.torch_dist.contents import args_of_run_config
from dist_convert.models.catalog import Where
from dist_convert.options import Options
from dist_convert.ranks.collectives import alone
from dist_convert.read.dcp import Chunk, place_chunks, read_metadata
from dist_convert.read.source import read_json
from dist_convert.read.torch_file import read_pickled_weights
from dist_convert.write.journal import read_journal, resume_state_of
from dist_convert.write.manifest import manifest_of, what_differs
from tests.attacks.damage import (
    Way,
    with_other_bytes,
    with_other_fields,
    with_other_header,
    with_other_instructions,
    with_other_values,
)
from tests.checkpoints import Model, training_args
from tests.distributed_checkpoints import make_distributed
from tests.meta_checkpoints import MODEL, params_of
from tests.to_megatron import config_of

#: No file of a few kilobytes costs more: processor time, and address space beyond what the program has at first.
MOST_SECONDS, MOST_MEMORY_BYTES = 5.0, 512 << 20
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [32, 32]}


@dataclass(frozen=True)
class Target:
    """A valid file, the ways to damage it, and the reader of its format."""

    name: str
    data: bytes
    ways: tuple[Way, ...]
    read: Callable[[Path], Any]


def _describe(args: dict[str, Any], file: str) -> None:
    architecture_from_args(args, vocab=None, file=file)
    grid_from_args(args, 1, imported_experts=False)
    true_vocab(flag=None, args=args, tokenizer=None, padded=32, file=file)


def _read_config(path: Path) -> None:
    architecture_from_config(read_json(path))


def _read_params(path: Path) -> None:
    rows = {"layers.0.attention.wq.weight": 64, "layers.0.feed_forward.w1.weight": 176, "output.weight": 64}
    args_of_params(read_json(path), rows, tied=False)


def _read_shard(path: Path) -> None:
    shard = read_shard(path, path.name)
    _describe(json.loads(json.dumps(shard_to_json(shard)))["args"], path.name)


def _read_pickle(path: Path) -> None:
    """As a shard whose container is sound, else nearly every damage is found by the checksum."""
    with zipfile.ZipFile(path.with_name("sound.pt")) as saved, zipfile.ZipFile(path.with_suffix(".pt"), "w") as archive:
        for name in saved.namelist():
            archive.writestr(name, path.read_bytes() if name.endswith("/data.pkl") else saved.read(name))
    _read_shard(path.with_suffix(".pt"))


def _read_codes(config: dict[str, Any] | Path, weights: Path) -> None:
    """The headers of a quantised model."""
    said = read_json(config) if isinstance(config, Path) else config
    header = read_weights_header(weights, weights.name)
    with_scales(header, quantisation_of(said), (frozenset({weights.name}),))


def _read_carried(model: Any, path: Path) -> None:
    model = replace(model, directory=path.parent)
    configs_of(model, model.catalog()[0].architecture, "BF16", Options("huggingface"))


def _read_journal(path: Path) -> None:
    """As the lines of a journal, each with the checksum that it should have."""
    found = json.loads(path.read_bytes())
    texts = [json.dumps(one).encode() for one in (found.values() if isinstance(found, dict) else found)]
    journal = path.parent / ".journal/run-00001-rank-00000"
    journal.write_bytes(b"".join(b"%08x %s\n" % (zlib.crc32(text), text) for text in texts))
    said = read_journal(path.parent, journal.name, [("host", "boot")])
    if said is None:
        raise CorruptFile("a damaged journal")
    resume_state_of([said])


def _read_manifest(path: Path) -> None:
    source = {"path": "/in", "files": {}}
    facts = {"format": 1, "source": source, "flags": {}, "plan": "", "settings": {}, "conversion": ""}
    if what_differs(path.parent, manifest_of(path.parent), facts) is None:
        raise CorruptFile("a damaged manifest")


def _read_blobs(chunks: list[tuple[str, str, Chunk]], path: Path) -> None:
    for key, dtype, chunk in chunks:  # one by one: the first damaged blob would hide the others
        place_chunks(path.parent, path.name, [(key, dtype, replace(chunk, blob=replace(chunk.blob, file=path.name)))])


def _make_files(directory: Path) -> None:
    """Small files of every format, the shard with all that training puts into one."""
    weights = {"a.weight": torch.ones(4, 3), "b.weight": torch.zeros(2, dtype=torch.bfloat16)}
    args = training_args(Model(layers=1, experts=2), path=Path("/a/b"))
    model = OrderedDict(
        weights, c=torch.ones(4, 2).T, d=torch.nn.Parameter(torch.ones(2)), _extra_state=io.BytesIO(b"a")
    )
    state = numpy.random.RandomState(0).get_state()
    rng = {"np_rng_state": ("MT19937", state[1][:4], *state[2:]), "torch_rng_state": torch.zeros(4, dtype=torch.uint8)}
    optimizer = {"param_groups": [{"lr": 0.1, "betas": (0.9, 0.95), "params": [0, 1]}], "state": {}}
    saved = {"args": args, "checkpoint_version": 3.0, "iteration": 4, "optimizer": optimizer, "rng_state": [rng]}
    torch.save({**saved, "model0": model, "model1": weights}, directory / "shard.pt")
    with zipfile.ZipFile(directory / "shard.pt") as archive:
        (directory / "data.pkl").write_bytes(archive.read("shard/data.pkl"))
    shutil.copyfile(directory / "shard.pt", directory / "sound.pt")
    torch.save(weights, directory / "model.bin")
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    index = {"metadata": {"total_size": 56}, "weight_map": dict.fromkeys(weights, "model.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    make_distributed(directory / "distributed", Model(layers=1, experts=2), keys="layers")
    for name in (".metadata", "__0_0.distcp"):
        shutil.copyfile(directory / "distributed/iter_0000004" / name, directory / name)
    shutil.copyfile(Path(__file__).parents[1] / "torch_dist/run_config.yaml", directory / "run_config.yaml")
    (directory / "config.json").write_text(config_of(Model(experts=2)).to_json_string())
    (directory / "params.json").write_text(json.dumps(params_of(MODEL, "3.1") | {"head_dim": 8, "sliding_window": 9}))
    codes = {"a.weight": torch.ones(64, 64).to(torch.float8_e4m3fn), "a.weight_scale_inv": torch.ones(2, 2)}
    save_file(codes, directory / "codes.safetensors", metadata={"format": "pt"})
    shutil.copyfile(directory / "codes.safetensors", directory / "sound.safetensors")
    (directory / "codes.json").write_text(json.dumps({"quantization_config": FP8}))
    boxes = json.dumps({name: {"saved_offsets": [0] * tensor.dim()} for name, tensor in weights.items()})
    save_file(weights, directory / "boxes.safetensors", metadata={"DCP_SHARDING_INFO": boxes})
    named = {"model": {"vocab": {"<s>": 0, "</s>": 1}}, "added_tokens": [{"id": 2, "content": "<pad>"}]}
    (directory / "tokenizer.json").write_text(json.dumps(named))
    roles = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "added_tokens_decoder": {"2": {"content": "<pad>"}}}
    (directory / "tokenizer_config.json").write_text(json.dumps(roles))
    (directory / ".journal").mkdir()
    wrote = {"wrote": [["model.safetensors", 8, 16, 32, 2, 1], ["model.safetensors", 99, 1, 1, 1, None]]}
    head = {"run": 1, "rank": 0, "host": "host", "boot": "boot"}
    changed = {"overflowed": ["model.safetensors", "a", 0, 1, 1, 2]}
    lost = {"lost": "model.safetensors", "until": 0}
    (directory / "journal.json").write_text(json.dumps([head, wrote, {"mark": 9}, changed, lost]))
    source = {"path": "/old", "files": {"a": {"size_bytes": 1, "modified_ns": 1, "header": ""}}}
    manifest = {"format": 1, "source": source, "flags": {}}
    (directory / "conversion.json").write_text(json.dumps(manifest | {"files": {"config.json": {"size_bytes": 1}}}))
    (directory / "args.json").write_text(json.dumps(read_shard(directory / "shard.pt", "shard.pt").args))


def targets(directory: Path) -> list[Target]:
    """A file of every format whose header is read."""
    _make_files(directory)
    saved = read_metadata(directory / ".metadata").tensors.items()
    chunks = [(key, tensor.dtype, chunk) for key, tensor in saved for chunk in tensor.chunks]
    checkpoint = open_checkpoint(Where(directory / "distributed"), alone())
    carried = {"config.json": config_json(checkpoint.catalog()[0].architecture, "BF16"), "generation_config.json": {}}
    (directory / "huggingface_configs.json").write_text(json.dumps(carried))
    values = (with_other_bytes, with_other_values, with_other_values)
    quantised = {"quantization_config": FP8}
    kinds: dict[str, tuple[tuple[Way, ...], Callable[[Path], Any]]] = {
        "data.pkl": ((with_other_bytes, with_other_instructions, with_other_instructions), _read_pickle),
        "shard.pt": ((with_other_bytes, with_other_fields, with_other_fields), _read_shard),
        "model.bin": (
            (with_other_bytes, with_other_fields, with_other_fields),
            lambda path: read_pickled_weights(path, path.name),
        ),
        ".metadata": ((with_other_bytes, with_other_instructions, with_other_instructions), read_metadata),
        "__0_0.distcp": ((with_other_bytes,), partial(_read_blobs, chunks)),
        "run_config.yaml": (
            (with_other_bytes,),
            lambda path: architecture_from_args(
                {**args_of_run_config(path.parent), "padded_vocab_size": 256}, vocab=None, file=path.name
            ),
        ),
        "model.safetensors": (
            (with_other_bytes, with_other_header, with_other_header),
            lambda path: read_weights_header(path, path.name),
        ),
        "model.safetensors.index.json": (
            (with_other_bytes, with_other_values),
            lambda path: read_index_file(path.parent, path.name),
        ),
        "config.json": (values, _read_config),
        "params.json": (values, _read_params),
        "codes.safetensors": ((with_other_bytes, with_other_header), partial(_read_codes, quantised)),
        "codes.json": (values, lambda path: _read_codes(path, path.with_name("sound.safetensors"))),
        "boxes.safetensors": ((with_other_header,), lambda path: read_safetensors_shard(path, path.name)),
        "huggingface_configs.json": (values, partial(_read_carried, checkpoint)),
        "tokenizer.json": (values, lambda path: read_huggingface(path.parent)),
        "tokenizer_config.json": (values, lambda path: read_huggingface(path.parent)),
        "journal.json": ((with_other_values,), _read_journal),
        "conversion.json": (values, _read_manifest),
        "args.json": ((with_other_values,), lambda path: _describe(read_json(path), path.name)),
    }
    files = {name: (directory / name).read_bytes() for name in kinds}
    return [Target(name, files[name], ways, read) for name, (ways, read) in kinds.items()]


def answer(target: Target, path: Path, damaged: bytes) -> str:
    """Read a damaged file; "read", or the name of an error of ours, "no text" if it says nothing.

    Raises:
        Exception: whatever a reader raised that is no error of ours.
        AssertionError: it took too long.
    """
    path.write_bytes(damaged)
    started = time.process_time()
    try:
        target.read(path)
        found = "read"
    except ConversionError as error:
        found = type(error).__name__ if str(error) else "no text"
    assert time.process_time() - started < MOST_SECONDS
    return found


def fuzz(target: Target, directory: Path, examples: int, chosen_seed: int) -> Counter[str]:
    """Read damaged files; returns how often each answer came."""
    answers: Counter[str] = Counter()
    damage = st.one_of([way(target.data) for way in target.ways])

    @seed(chosen_seed)
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(damaged=damage)
    def once(damaged: bytes) -> None:
        answers[answer(target, directory / target.name, damaged)] += 1

    once()
    (directory / target.name).write_bytes(target.data)
    return answers


def limit_memory() -> None:
    """End this process's allocations where a small file makes a reader allocate much."""
    fields = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    size_bytes = next(int(words[1]) << 10 for words in fields if words[0] == "VmSize:")
    resource.setrlimit(resource.RLIMIT_AS, (size_bytes + MOST_MEMORY_BYTES, resource.RLIM_INFINITY))


def main() -> None:
    """Fuzz all readers in turn until the time is over, and print how often each answer came."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    ends_at = time.monotonic() + parser.parse_args().seconds
    chance = random.Random()
    answers: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as name:
        made = targets(Path(name))
        limit_memory()
        while time.monotonic() < ends_at:
            for target in made:
                counted = answers.setdefault(target.name, Counter())
                counted += fuzz(target, Path(name), 500, chance.randrange(1 << 32))
    for name, counted in answers.items():
        print(f"{name:30}{counted.total():9,} files:", ", ".join(f"{n:,} {kind}" for kind, n in counted.most_common()))
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MiB, nothing untyped")


if __name__ == "__main__":
    main()
