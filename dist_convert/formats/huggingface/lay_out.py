"""What becomes a Hugging Face directory: what is read, what is written beside the weights, and what is said about it.

The model card's front matter is what the Hugging Face Hub reads (https://huggingface.co/docs/hub/model-cards). It holds
no date and no path, so that the same checkpoint gives the same card on every machine; a license is not known, so none
is named.
"""

import json
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch

from dist_convert.errors import shown_line
from dist_convert.formats.dcp.files import PlannedFiles, lay_out_chunks
from dist_convert.formats.format import Model
from dist_convert.formats.huggingface import files as hf_files
from dist_convert.formats.huggingface.config import SPECIAL_IDS, TORCH_NAMES
from dist_convert.formats.huggingface.open import HuggingFaceModel, check_tied, configs_of
from dist_convert.formats.huggingface.read import ARGS_FILE, CONFIG_FILE, WEIGHTS_KINDS, check_inside
from dist_convert.formats.huggingface.upload import check_upload
from dist_convert.formats.megatron.args import check_own_vocab, is_of_habana, model_type_from_args, true_vocab
from dist_convert.formats.megatron.grid import Grid
from dist_convert.formats.tokenizer import record as tokenizers
from dist_convert.formats.tokenizer.huggingface import TEMPLATES, has_tokenizer_files, tokenizer_files
from dist_convert.formats.torch.capacity_bins import Bin, read_bins, write_bins
from dist_convert.formats.torch.catalog import TorchCatalog
from dist_convert.formats.torch.open import TorchModel
from dist_convert.models import FAMILIES
from dist_convert.models.catalog import Catalog
from dist_convert.options import DCP, FSDP_DTENSOR, TARGET_DTYPES, Options
from dist_convert.plan.content import Content, notes_on_content, plan_content
from dist_convert.plan.file_owners import deal_files, file_numbers, notes_on_disks
from dist_convert.ranks.collectives import World, gather_objects
from dist_convert.read.source import MAX_BYTES, opened_source, read_small_file, reading
from dist_convert.records import JsonObject, TargetFile, __version__, human_bytes, names
from dist_convert.write.checksums import KnownRanges
from dist_convert.write.files import Directory, make_file, write_file
from dist_convert.write.manifest import MANIFEST_FILE
from dist_convert.write.partial import RESUMABLE
from dist_convert.write.target_disks import find_disks
from dist_convert.write.task import Target, Task

CARD_FILE = "README.md"
#: What may lie beside the weights and belongs to the model: configs, tokenizer, card, license, code, templates.
_SUFFIXES = ("", ".json", ".jsonl", ".txt", ".md", ".model", ".tiktoken", ".jinja", ".py", ".yaml", ".yml")
_NOT_COPIED = (CONFIG_FILE, MANIFEST_FILE, *(index for index, _ in WEIGHTS_KINDS))


@dataclass(frozen=True)
class HuggingFaceTarget(Target):
    """A Hugging Face directory that is to be made, or a distributed checkpoint with the same beside it.

    Attributes:
        job: what was asked for.
        content: what is converted.
        model: the source; of one of Hugging Face, all but the weights is taken over as it is.
        configs: file name to content of what is written in JSON.
        copied: names of the source's files that are copied.
        bins: the grid and the capacity bins of all its ranks, where the job asks for them.
        disks: how many hold a part of the target each.
        planned: the weights files, where they are those of a distributed checkpoint.
    """

    job: Options
    content: Content
    model: Model
    configs: Mapping[str, JsonObject]
    copied: Sequence[str] = ()
    bins: tuple[Grid, Sequence[Bin]] | None = None
    disks: int = 1
    planned: PlannedFiles | None = None

    @property
    def style(self) -> tokenizers.Style:
        """Of the tokenizer."""
        return tokenizers.style_of(self.model.tokenizer, self.configs[CONFIG_FILE], self.job)

    def make_files(self, partial: Directory, files: Sequence[TargetFile], *, is_first: bool) -> None:
        if is_first:  # first, so that what fails here fails early
            for name, content in tokenizer_files(self.model.tokenizer, self.style):
                write_file(partial, name, content)
        if self.planned is not None:
            self.planned.make(partial, files)
            return
        for file in files:
            make_file(partial, file.name, [(0, file.header)], file.size_bytes)

    def complete(self, partial: Directory, files: Sequence[TargetFile], known: KnownRanges, *, is_first: bool) -> None:
        """Write or copy all that is no weight into the partial directory."""
        if self.planned is not None:
            self.planned.write_checksums(partial, files, known)
        if not is_first:
            return
        for name in self.copied:
            write_file(partial, name, read_small_file(self.model.directory / name))
        if self.planned is None and not isinstance(self.model, HuggingFaceModel):
            write_file(partial, CARD_FILE, model_card(self.content, self.model).encode())
        if self.bins is not None:
            write_bins(partial, *self.bins)
        for name, config in self.configs.items():
            write_file(partial, name, (json.dumps(config, indent=2) + "\n").encode())
        if self.planned is not None:
            self.planned.write_metadata(partial, has_paths=True)
        elif index := hf_files.index_json(self.content.files):
            write_file(partial, hf_files.INDEX_FILE, index.encode())

    def next_step(self) -> str:
        """See `Target`; after an upload it is said there."""
        lines, target = [], self.job.target
        if self.disks > 1:
            lines.append(f"{target} is a part of the model on each of {self.disks} disks: copy them into one directory")
        is_none = self.model.tokenizer.kind == "none" and not isinstance(self.model, HuggingFaceModel)
        if is_none and not has_tokenizer_files(target):  # none was added since, either
            config = self.configs[CONFIG_FILE]
            ids = ", ".join(f"{key} {config[key]}" for key in SPECIAL_IDS if config.get(key) is not None) or "none"
            (why,) = tokenizers.notes_on_tokenizer(self.model.tokenizer, self.style, None)
            lines.append(f"{why}; special ids in {CONFIG_FILE}: {ids}; {tokenizers.how_to_add_tokenizer(self.job)}")
        return "" if self.job.push_to_hub else "\n".join(map(shown_line, lines))


def files_to_copy(directory: Path, weights: Collection[str]) -> tuple[list[str], list[str]]:
    """The files of a model that are copied, and the names of all else there that is not its weights.

    Raises:
        CorruptFile: one is a link to somewhere else, or no file to be read.
        SourceError: one or the directory cannot be read.
    """
    copied, others = [], []
    weights = {*weights, *_NOT_COPIED}
    with reading(directory):
        for path in sorted(directory.iterdir()):
            if path.name in weights or path.name.startswith("."):
                continue
            if path.name == TEMPLATES:
                copied += [f"{TEMPLATES}/{template.name}" for template in sorted(path.glob("*.jinja"))]
            elif (
                path.is_file()
                and path.suffix in _SUFFIXES
                and path.name != RESUMABLE
                and path.stat().st_size <= MAX_BYTES
            ):
                copied.append(path.name)
            else:
                others.append(path.name)
    for name in copied:
        check_inside(directory, name)
        with opened_source(directory / name, str(directory / name)):
            pass
    return copied, others


def model_card(content: Content, model: Model) -> str:
    """The text of the card of what was converted; of the source's and the tokenizer's paths only names are told."""
    a, grid = content.ends.source.architecture, content.ends.source.title.partition(", ")[2]
    hf_class = FAMILIES[a.family].hf_class
    checkpoint = Path(os.path.abspath(model.directory))  # a relative path has no parent; a link keeps its name
    elements = Counter[str]()
    for tensor in (tensor for file in content.files for tensor in file.tensors):
        elements[tensor.dtype] += tensor.elements
    stored = ", ".join(f"{TORCH_NAMES[dtype]} ({count:,})" for dtype, count in elements.most_common())
    is_megatron = model.args is not None
    kind, tag = ("a Megatron-LM checkpoint", "\n- megatron-lm") if is_megatron else ("Meta's own files", "")
    sizes = "checkpoint's own training arguments" if is_megatron else "params.json beside them"
    layout = f"Megatron-LM `{model.format}`, {grid}" if is_megatron else grid
    of_each, tied = " of each expert" if a.experts else "", ", tied embeddings" if a.tied else ""
    experts = f"| Experts | {a.experts:,}, {a.experts_per_token:,} for each token |\n" if a.experts else ""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- {a.family}{tag}
- dist_convert
---

# {hf_class} of {elements.total():,} parameters

Converted from {kind}. The sizes are those of the {sizes}.

| Model | |
|---|---|
| Layers | {a.layers:,} |
| Hidden size | {a.hidden:,} |
| Feed-forward size | {a.ffn:,}{of_each} |
| Attention heads | {a.heads:,}, each of {a.head_dim:,} |
| Key and value heads | {a.query_groups:,} |
| Vocabulary | {a.vocab:,}{tied} |
| Positions | {a.max_positions:,} |
{experts}| Parameters | {elements.total():,} |
| Stored as | {stored} |

| Conversion | |
|---|---|
| Checkpoint | {_code(checkpoint.parent.name)}, {_code(checkpoint.name)} |
| Format | {layout}, {TORCH_NAMES[content.ends.source.params_dtype]} |
| Converted by | dist_convert {__version__} with torch {torch.__version__} |
| Weights load with | transformers 4.49 and later |
| Tokenizer at conversion | {_origin(model.tokenizer)} |
| Plan digest | `{content.digest}` |

The plan digest is a SHA-256 of the model's sizes and of the place of every tensor in the checkpoint and here. It tells
how the bytes were moved, not which bytes: checksums of the files are in `conversion.json`. The license is that of the
checkpoint; this card does not know it.
"""


def _origin(tokenizer: tokenizers.Tokenizer) -> str:
    """Where the tokenizer came from, and by which packages it was built."""
    if tokenizer.path is None:
        return "none"
    name = _code(Path(os.path.abspath(tokenizer.path)).name)
    if tokenizer.kind == "huggingface":
        return f"copied from the directory {name}"
    versions = " and ".join(f"{package} {version(package)}" for package in ("transformers", "tokenizers"))
    if tokenizer.kind == "slow":
        return f"copied from the directory {name}, `tokenizer.json` built with {versions}"
    kind = {"tiktoken": "tiktoken", "sentencepiece": "SentencePiece"}[tokenizer.kind]
    return f"built from {name} ({kind}) with {versions}"


def _code(name: str) -> str:
    """A file's name as Markdown shows it unchanged in a table."""
    plain = "".join(letter if letter.isprintable() and letter not in "`|" else "_" for letter in name)
    return f"`{plain}`"


def to_huggingface(job: Options, model: Model, world: World) -> Task:
    """Work out the Hugging Face directory that a model becomes.

    Raises:
        SourceError, UsageError: all that the headers and flags show to be wrong.
        UploadError: what can be known now of an upload that would not start.
        TargetError: see `find_disks`.
    """
    source, left_behind = model.catalog()
    if model.args is None:
        check_own_vocab(job.true_vocab_size, source.architecture.vocab)
    notes = []
    if job.push_to_hub and world.rank == 0:
        notes.append(check_upload(job))
    job = replace(job, target_params_dtype=job.target_params_dtype or ("bf16" if model.args else "keep"))
    target_dtype = TARGET_DTYPES[job.target_params_dtype or "keep"]
    specs = hf_files.target_tensors(source, target_dtype)
    planned = lay_out_chunks(specs, job.max_shard_size_bytes) if job.to == DCP else None
    files = planned.target_files() if planned else hf_files.lay_out_files(specs, job.max_shard_size_bytes)
    catalog = hf_files.catalog_of_files(source.architecture, files, planned.stored() if planned else None)
    content = plan_content(source, catalog, files, target_dtype=target_dtype, left_behind=left_behind)
    if isinstance(model, HuggingFaceModel):
        check_tied(model, source, world)
    otherwise = "--save-per-node if each node is to keep some of the files"
    disks = find_disks(world, job.target, is_per_node=job.save_per_node, otherwise=otherwise)
    all_files = (frozenset(file.name for file in content.files),)
    of_disks = deal_files(content, model.found.visible, disks) if max(disks) else all_files
    configs, dtype = dict[str, JsonObject](), content.ends.target.params_dtype
    if world.rank == 0:  # a tokenizer's or another path may be there only
        configs |= configs_of(model, source.architecture, dtype, job)
    configs = gather_objects(world, configs)[0] | ({} if model.args is None else {ARGS_FILE: model.args})
    is_copy = isinstance(model, HuggingFaceModel)
    copied, others = files_to_copy(model.directory, model.found.identity) if is_copy else ([], [])
    bins = _bins(job, model, source, world)
    target = HuggingFaceTarget(job, content, model, configs, copied, bins, len(of_disks), planned)
    notes += [*model.notes, *(notes_on_content(content) if is_copy else _notes(target))]
    notes += [f"not converted: files that are not part of the model: {names(others)}"] if others else []
    if job.save_per_node:
        sizes = [human_bytes(sum(file.size_bytes for file in content.files if file.name in held)) for held in of_disks]
        numbers = [f"weights files {file_numbers(content, held)} of {len(content.files)}" for held in of_disks]
        notes += notes_on_disks("--save-per-node", disks, [*map(", ".join, zip(numbers, sizes, strict=True))])
    return Task(
        job=job,
        content=content,
        source=model,
        target=job.target,
        rank=world.rank,
        disks=disks,
        writable=tuple(of_disks[disk] for disk in disks),
        notes=notes,
        layout=target,
        is_divided=len(of_disks) > 1,
    )


def _bins(job: Options, model: Model, source: Catalog, world: World) -> tuple[Grid, list[Bin]] | None:
    """The capacity bins of all ranks, where they are asked for."""
    if not (job.save_capacity_bins and isinstance(model, TorchModel) and isinstance(source, TorchCatalog)):
        return None
    mine = [model.shards[name] for name in model.found.headers_of[world.rank]]
    of_ranks = gather_objects(world, read_bins(model.directory, source, mine))
    return source.grid, [bin for of_rank in of_ranks for bin in of_rank]


#: The most positions that a Llama is known to have with a theta of 10000.
_LLAMA_2_POSITIONS = 4096


def _notes(target: HuggingFaceTarget) -> list[str]:
    """What the user should know before the conversion starts, a line each."""
    job, content, tokenizer = target.job, target.content, target.model.tokenizer
    architecture = content.ends.source.architecture
    args = {"vocab_size": target.model.vocab} if target.model.args is None else target.model.args
    notes = []
    if job.push_to_hub and tokenizer.kind == "none":
        notes.append("warning: the model is uploaded without a tokenizer")
    decided, said = model_type_from_args(args), job.source_model_type
    if said and (said != decided if decided else said in ("mixtral", "llama3.1")):
        args_say = f"the checkpoint's args say {decided or 'llama without rope scaling'}"
        notes.append(f"warning: --source-model-type says {said}, {args_say}; the args are followed")
    is_longer = decided or architecture.max_positions > _LLAMA_2_POSITIONS
    if is_of_habana(args) and architecture.rope_theta == 10000 and is_longer:
        scaled = "rope_theta is 10000" + ("" if architecture.rope_scaling else ", without rope_scaling,")
        notes.append(
            f"warning: {scaled} according to the args, for {architecture.max_positions} positions; Habana's importer "
            "writes this whatever the model has. If the checkpoint was imported and not trained since, give the right "
            "values with --like (the original's config.json), or with --rope-theta and --rope-scaling-factor"
        )
    flag, rows = job.true_vocab_size, architecture.padded_vocab
    size, who = true_vocab(flag=flag, args=args, tokenizer=tokenizer.size, padded=rows, file="args")
    if size != rows or who == "padded size":
        hint = "; --true-vocab-size cuts the padding" if who == "padded size" else ""
        notes.append(f"vocabulary: {size} tokens according to {who}, {rows} rows in the embedding{hint}")
    claims = {"tokenizer": tokenizer.size, "args": args.get("vocab_size")}
    notes += tokenizers.vocabulary_warnings(claims | ({} if flag is None else {"--true-vocab-size": flag}), rows, size)
    trained = str(args.get("params_dtype")).removeprefix("torch.")
    stored = TORCH_NAMES[content.ends.source.params_dtype]
    is_beside = target.model.format == FSDP_DTENSOR  # saves what training keeps in fp32 beside the parameters
    if trained in TORCH_NAMES.values() and trained != stored and not is_beside:
        notes.append(f"warning: the args say {trained}, most weights are stored in {stored}")
    notes += notes_on_content(content)
    if content.zero_tensors:
        notes.append(f"all zeros, because Megatron has no such parameter: {names(content.zero_tensors)}")
    if tokenizer.kind == "none" and not (job.dry_run or job.push_to_hub):
        return notes  # the end says it, with what to do
    return notes + tokenizers.notes_on_tokenizer(tokenizer, target.style, said)
