"""Opens a checkpoint of Megatron's `torch` format: which iteration, which rank sees which file, and every header."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dist_convert.errors import InconsistentShards, below
from dist_convert.formats.foreign import notes_on_classes, refuse_foreign_tensors
from dist_convert.formats.format import MegatronModel
from dist_convert.formats.megatron.grid import COPY_ONE, SHARD_FILE, rank_numbers, sizes_of_directories
from dist_convert.formats.megatron.iterations import notes_on_iteration, rank_files
from dist_convert.formats.megatron.names import TELLING_SIZES, TIED, normalise
from dist_convert.formats.megatron.said import said_of
from dist_convert.formats.tokenizer.find import shared_tokenizer
from dist_convert.formats.torch.catalog import TorchCatalog
from dist_convert.formats.torch.shards import (
    Shard,
    files_beside,
    read_shard,
    shard_from_json,
    shard_to_json,
    stored_names,
)
from dist_convert.formats.torch.survey import check_same_run, open_catalog
from dist_convert.models.catalog import LeftBehind, Where, by_reason
from dist_convert.models.schema import MOST_RANKS, is_size
from dist_convert.options import TORCH
from dist_convert.ranks.collectives import World, gather_objects
from dist_convert.read.discover import Discovery, discover
from dist_convert.records import JsonObject, counted, names


@dataclass(frozen=True, kw_only=True)
class TorchModel(MegatronModel):
    """A checkpoint whose headers are read; its args are those of the first file.

    Attributes:
        shards: the headers, by file.
        imported_experts: see `survey.open_catalog`.
        pinned: see `TorchCatalog`.
        is_untied: its head is not the embedding, whatever the args say or leave open.
        surveyed: what `catalog` answered last, to which the same question is answered alike.
    """

    shards: Mapping[str, Shard]
    imported_experts: bool = False
    pinned: frozenset[str] = frozenset()
    is_untied: bool = False
    surveyed: list[tuple[TorchCatalog, LeftBehind]] = field(default_factory=list, repr=False)
    format: str = TORCH

    def catalog(self, vocab: int | None = None, *, with_tied_copies: bool = False) -> tuple[TorchCatalog, LeftBehind]:
        """See `Model`."""
        with below(self.directory):
            architecture = self.said.architecture(vocab=self.vocab or vocab, file=min(self.shards))
            architecture = replace(architecture, tied=architecture.tied and not self.is_untied)
            may_have_copies = with_tied_copies and (architecture.tied or bool(architecture.fact("mtp_layers")))
            asked = architecture, may_have_copies, self.pinned
            if [(one.architecture, one.with_tied_copies, one.pinned) for one, _ in self.surveyed] != [asked]:
                self.surveyed[:] = [
                    open_catalog(
                        self.shards,
                        architecture,
                        imported_experts=self.imported_experts,
                        with_tied_copies=may_have_copies,
                        pinned=self.pinned,
                        drops_mtp=self.said.drops_mtp,
                    )
                ]
        [(catalog, left_behind)] = self.surveyed
        return catalog, (*left_behind, *self.beside)


def with_stored_sizes(args: JsonObject, shards: Mapping[str, Shard]) -> tuple[JsonObject, tuple[str, ...]]:
    """The args with the sizes that tensors tell: the padded one of the vocabulary, and those of layers that are absent.

    Returns:
        The args; and a warning where they said another padded size than the embedding has.
    """
    tensor_parallel = args.get("tensor_model_parallel_size") or 1
    if not is_size(tensor_parallel, MOST_RANKS):
        return args, ()
    args = {**args, **_sizes_of_layers(args, shards[min(shards)], tensor_parallel)}
    chunks = (chunk for shard in shards.values() for chunk in shard.chunks)
    found = (tensor for chunk in chunks for name, tensor in chunk.items() if normalise(name) in TIED and tensor.shape)
    if (tensor := next(found, None)) is None:
        return args, ()
    rows = tensor.shape[0] * tensor_parallel
    sizes = dict.fromkeys(str(shard.args.get("padded_vocab_size") or rows) for shard in shards.values())
    said = names(sizes, between=" and ")
    warning = f"warning: the args say padded_vocab_size {said}, the embedding has {rows} rows; the embedding is right"
    return {**args, "padded_vocab_size": rows}, () if said == str(rows) else (warning,)


def _sizes_of_layers(args: JsonObject, shard: Shard, tensor_parallel: int) -> JsonObject:
    """What args do not say of gated layers with query groups, from the shapes of those in a shard."""
    shapes = {
        ".".join(normalise(name).split(".")[-3:]): one.shape for chunk in shard.chunks for name, one in chunk.items()
    }
    gated, projection, fused = (shapes.get(name, ()) for name in TELLING_SIZES)
    sizes: dict[str, Any] = {"ffn_hidden_size": gated[0] * tensor_parallel // 2} if gated else {}
    heads = args.get("num_attention_heads")
    if heads and is_size(heads) and len(projection) == len(fused) == 2:
        sizes["kv_channels"] = head_dim = max(1, projection[1] * tensor_parallel // heads)
        if "group_query_attention" not in args:
            groups = (fused[0] * tensor_parallel // head_dim - heads) // 2
            sizes |= {"num_query_groups": groups, "group_query_attention": groups != heads}
    absent = {name for name in sizes if args.get(name) is None}
    return {name: size for name, size in sizes.items() if name in absent}


def read_shards(directory: Path, world: World) -> tuple[Discovery, dict[str, Shard]]:
    """The files of an iteration and their headers, each read by one rank that sees it.

    Raises:
        CheckpointNotFound: no rank sees any file.
        SourceError: see `read_shard` and `discover`.
    """
    files = rank_files(directory) if directory.is_dir() else ()
    expected = f"mp_rank_00/{SHARD_FILE} or the like in {directory}"
    with below(directory):
        found = discover(
            world, directory, files, lambda file: shard_to_json(read_shard(directory / file, file)), expected=expected
        )
    shards = {file: shard_from_json(header) for file, header in found.headers.items()}
    args = shards[min(shards)].args
    if args.get("tensor_model_parallel_size") is None:
        _check_one_grid(shards, directory)
    sizes = sizes_of_directories(shards, args)
    return found, {file: replace(shard, args={**shard.args, **sizes}) for file, shard in shards.items()}


def _check_one_grid(shards: Mapping[str, Shard], directory: Path) -> None:
    """Refuse rank directories that hold parts of two grids, where no args but their names tell the grid.

    Raises:
        InconsistentShards: names of two forms, or a tensor of several shapes on the tensor parallel ranks of a stage.
    """
    forms: dict[str, list[str]] = {}
    stages: dict[tuple[int, ...], list[Shard]] = {}
    for file, shard in sorted(shards.items()):
        _, *stage = rank_numbers(file)
        forms.setdefault(f"names with {counted(len(stage) + 1, 'number')}", []).append(file)
        stages.setdefault(tuple(stage), []).append(shard)
    _check_alike(forms, directory, "")
    for ranks in stages.values():
        shapes: dict[str, dict[str, list[str]]] = {}
        for shard in ranks:
            for name, tensor in ((name, tensor) for chunk in shard.chunks for name, tensor in chunk.items()):
                shapes.setdefault(name, {}).setdefault(str(list(tensor.shape)), []).append(shard.file)
        for name, files in shapes.items():
            _check_alike(files, directory, name)


def _check_alike(files: Mapping[str, Sequence[str]], directory: Path, tensor: str) -> None:
    """Refuse files of several kinds; `files` are those of each kind."""
    if len(files) > 1:
        shown = [f"{what} in {names(file.partition('/')[0] for file in which)}" for what, which in files.items()]
        raise InconsistentShards(
            "rank directories of two grids, and the args do not say which one is meant",
            directory,
            tensor=tensor,
            expected="directories of one grid, with equal shares of every tensor",
            found="; ".join(shown),
            remedy=COPY_ONE,
        )


def open_torch(
    where: Where, directory: Path, world: World, found: Discovery, shards: Mapping[str, Shard]
) -> TorchModel:
    """The model of all shards' headers.

    Raises:
        SourceError: the shards are not of one run, or their args say no model.
    """
    refuse_foreign_tensors({file: stored_names(shard) for file, shard in shards.items()}, directory)
    check_same_run(shards.values(), directory)
    file = min(shards)
    iteration = shards[file].iteration
    with below(directory):
        args, on_rows = with_stored_sizes(shards[file].args, shards)
        said = said_of(where, args, file)
        padded = said.architecture(vocab=None, file=file).padded_vocab
    chunks = (chunk for shard in shards.values() for chunk in shard.chunks)
    found = found.with_checksums(tensor for chunk in chunks for tensor in chunk.values())
    shown = str(directory / file)
    tokenizer, vocab = shared_tokenizer(where, said.args, directory, world, padded=padded, file=shown)
    classes = sorted({name for shard in shards.values() for name in shard.foreign_classes})
    return TorchModel(
        directory=directory,
        found=found,
        said=said,
        iteration=iteration,
        tokenizer=tokenizer,
        vocab=vocab,
        beside=_beside(world, directory, found.headers_of[world.rank]),
        notes=(*on_rows, *said.notes, *notes_on_iteration(directory, iteration), *notes_on_classes(classes)),
        shards=shards,
        imported_experts=where.asked.habana_imported_experts,
    )


def _beside(world: World, directory: Path, mine: Sequence[str]) -> LeftBehind:
    """Files in the rank directories that hold no weights, each counted by the rank that read the header beside it."""
    listings = gather_objects(world, [files_beside(directory, file) for file in mine])
    found = (item for of_rank in listings for of_directory in of_rank for item in of_directory.items())
    return by_reason((name, 1, size_bytes) for name, size_bytes in found)
