"""What becomes a Hugging Face directory: what is read, what is written, and what is said about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dist_convert.formats.format import Model
from dist_convert.formats.huggingface.config import TORCH_NAMES, config_json, config_like, config_of_copy, published
from dist_convert.formats.huggingface.files import catalog_of_files, lay_out_files, target_tensors
from dist_convert.formats.huggingface.open import HuggingFaceModel, check_tied
from dist_convert.formats.huggingface.target import HuggingFaceTarget, files_to_copy
from dist_convert.formats.huggingface.upload import check_upload
from dist_convert.formats.megatron.args import model_type_from_args, true_vocab
from dist_convert.formats.tokenizer.record import notes_on_tokenizer, style_of, vocabulary_warnings
from dist_convert.formats.torch.capacity_bins import Bin, read_bins
from dist_convert.formats.torch.catalog import TorchCatalog
from dist_convert.formats.torch.open import TorchModel
from dist_convert.models.catalog import Catalog
from dist_convert.options import TARGET_DTYPES, Options
from dist_convert.plan.content import Content, notes_on_content, plan_content
from dist_convert.plan.file_owners import deal_files, file_numbers
from dist_convert.ranks.collectives import World, gather_objects
from dist_convert.records import human_bytes, names
from dist_convert.write.places import find_places
from dist_convert.write.task import Task


def to_huggingface(job: Options, model: Model, world: World) -> Task:
    """Work out the Hugging Face directory that a model becomes.

    Raises:
        SourceError: all that the headers show to be wrong.
        TargetError: see `find_places`.
        UploadError: what can be known now of an upload that would not start.
        TargetError: nodes see different targets, and no flag says that this is meant.
    """
    notes = []
    if job.push_to_hub and world.rank == 0:
        notes.append(check_upload(job.target, job.push_to_hub, private=job.private))
    source, left_behind = model.catalog()
    job = replace(job, target_params_dtype=job.target_params_dtype or ("bf16" if model.args else "keep"))
    target_dtype = TARGET_DTYPES[job.target_params_dtype or "keep"]
    files = lay_out_files(target_tensors(source, target_dtype), job.max_shard_size_bytes)
    content = plan_content(
        source,
        catalog_of_files(source.architecture, files),
        files,
        target_dtype=target_dtype,
        left_behind=left_behind,
    )
    if isinstance(model, HuggingFaceModel):
        check_tied(model, source, world)

    places = find_places(
        world,
        job.target,
        is_per_node=job.save_per_node,
        otherwise="--save-per-node if each node is to keep some of the files",
    )
    of_places: tuple[frozenset[str], ...] = (frozenset(file.name for file in content.files),)
    is_divided = bool(max(places))
    if is_divided:
        of_places = deal_files(content, model.found.visible, places)
    layout, more_notes = _layout(job, model, source, content, world, disks=len(of_places))
    return Task(
        job=job,
        content=content,
        source=model,
        target=job.target,
        rank=world.rank,
        places=places,
        writable=tuple(of_places[place] for place in places),
        notes=notes + more_notes + _notes_on_places(job, content, places, of_places),
        layout=layout,
        is_divided=is_divided,
    )


def _layout(
    job: Options, model: Model, source: Catalog, content: Content, world: World, *, disks: int
) -> tuple[HuggingFaceTarget, list[str]]:
    """What is made beside the weights, and what the user should know of it all."""
    dtype = content.ends.target.params_dtype
    if isinstance(model, HuggingFaceModel):
        copied, others = files_to_copy(model.directory)
        notes = notes_on_content(content)
        notes += [f"left behind: files that are no part of the model: {names(others)}"] if others else []
        given = dict(model.config) | ({MTP_KEY: 0} if model.drops_mtp and MTP_KEY in model.config else {})
        config = config_of_copy(given, source.architecture, dtype)
        return HuggingFaceTarget(job, content, model, config, copied=copied, disks=disks), notes
    bins = None
    if job.save_capacity_bins and isinstance(model, TorchModel) and isinstance(source, TorchCatalog):
        mine = [model.shards[name] for name in model.found.headers_of[world.rank]]
        of_ranks: list[list[Bin]] = gather_objects(world, read_bins(model.directory, mine))
        bins = source, [bin for of_rank in of_ranks for bin in of_rank]
    like = model.config
    config = config_like(like, source.architecture, dtype) if like else config_json(source.architecture, dtype)
    directory = model.tokenizer.path if job.like is None else job.like if job.like.is_dir() else job.like.parent
    theirs = published(config, directory) if world.rank == 0 else {}
    target = HuggingFaceTarget(job, content, model, config, published=theirs, bins=bins, disks=disks)
    return target, [*model.notes, *_notes(target)]


def _notes_on_places(
    job: Options, content: Content, places: Sequence[int], of_places: Sequence[frozenset[str]]
) -> list[str]:
    if not job.save_per_node:
        return []
    if len(of_places) == 1:
        return ["--save-per-node has no effect: all ranks see one and the same target"]
    notes = []
    for place, files in enumerate(of_places):
        ranks = [str(rank) for rank, of_rank in enumerate(places) if of_rank == place]
        size_bytes = sum(file.size_bytes for file in content.files if file.name in files)
        notes.append(
            f"own disk of {'ranks' if len(ranks) > 1 else 'rank'} {', '.join(ranks)}: weights files "
            f"{file_numbers(content, files)} of {len(content.files)}, {human_bytes(size_bytes)}"
        )
    return notes


MTP_KEY = "num_nextn_predict_layers"
#: The most positions that a Llama is known to have with a theta of 10000.
_LLAMA_2_POSITIONS = 4096


def _notes(target: HuggingFaceTarget) -> list[str]:
    """What the user should know before the conversion starts, a line each."""
    job, content, tokenizer = target.job, target.content, target.model.tokenizer
    args, architecture = target.model.args or {}, content.ends.source.architecture
    notes = []
    if job.push_to_hub and tokenizer.kind == "none":
        notes.append("warning: the model is uploaded without a tokenizer")
    decided, said = model_type_from_args(args), job.source_model_type
    if said and (said != decided if decided else said in ("mixtral", "llama3.1")):
        notes.append(
            f"warning: --source-model-type says {said}, the checkpoint's args say "
            f"{decided or 'llama without rope scaling'}; the args are followed"
        )
    if architecture.rope_theta == 10000 and (decided or architecture.max_positions > _LLAMA_2_POSITIONS):
        scaled = "rope_theta is 10000" + ("" if architecture.rope_scaling else ", without rope_scaling,")
        notes.append(
            f"warning: {scaled} according to the args, for {architecture.max_positions} positions; Habana's importer "
            "leaves that whatever the model has. If the checkpoint was imported and not trained since, take both from "
            "the original's config.json into this one's"
        )
    flag, rows = job.true_vocab_size, architecture.padded_vocab
    size, who = true_vocab(flag=flag, args=args, tokenizer=tokenizer.size, padded=rows, file="args")
    if size != rows or who == "padded size":
        notes.append(f"vocabulary: {size} tokens according to {who}, {rows} rows in the embedding")
    claims = {"tokenizer": tokenizer.size, "args": args.get("vocab_size")}
    notes += vocabulary_warnings(claims | ({} if flag is None else {"--true-vocab-size": flag}), rows, size)
    trained = str(args.get("params_dtype")).removeprefix("torch.")
    stored = TORCH_NAMES[content.ends.source.params_dtype]
    if trained in TORCH_NAMES.values() and trained != stored:
        notes.append(f"warning: the args say {trained}, most weights are stored in {stored}")
    notes += notes_on_content(content)
    if content.zero_tensors:
        notes.append(f"all zeros, because Megatron has no such parameter: {names(content.zero_tensors)}")
    style = style_of(tokenizer, target.config, job)
    return notes + notes_on_tokenizer(tokenizer, style, said)
