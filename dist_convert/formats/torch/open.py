"""Opens a checkpoint of Megatron's `torch` format: which iteration, which rank sees which file, and every header."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dist_convert.errors import InconsistentShards
from dist_convert.formats.megatron.args import architecture_from_args, true_vocab
from dist_convert.formats.tokenizer.find import find_tokenizer
from dist_convert.formats.tokenizer.record import Tokenizer
from dist_convert.formats.torch.catalog import TorchCatalog
from dist_convert.formats.torch.shards import (
    Shard,
    files_beside,
    iteration_directory,
    rank_files,
    read_shard,
    shard_from_json,
    shard_to_json,
    tracked_name,
)
from dist_convert.formats.torch.survey import check_same_run, open_catalog
from dist_convert.models.catalog import NAME_FLAG, LeftBehind, Where
from dist_convert.ranks.collectives import World, gather_objects
from dist_convert.read.discover import Discovery, discover
from dist_convert.write.files import TRACKER_FILE


@dataclass(frozen=True)
class TorchModel:
    """A checkpoint whose headers are read.

    Attributes:
        directory: the iteration's, as this rank sees it.
        found: its files.
        shards: their headers, by file.
        tokenizer: the one that the args or the user name, as rank 0 sees it.
        vocab: tokens without padding; None where nobody says.
        imported_experts: see `survey.open_catalog`.
        beside: further files in the rank directories.
        pinned: see `TorchCatalog`.
        is_untied: its head is not the embedding, whatever the args say or leave open.
    """

    directory: Path
    found: Discovery
    shards: Mapping[str, Shard]
    tokenizer: Tokenizer
    vocab: int | None
    imported_experts: bool = False
    beside: LeftBehind = ()
    pinned: frozenset[str] = frozenset()
    is_untied: bool = False

    @property
    def config(self) -> None:
        return None

    @property
    def args(self) -> dict[str, Any]:
        """The training arguments, as the first file has them."""
        return self.shards[min(self.shards)].args

    def catalog(self, vocab: int | None = None, *, with_tied_copies: bool = False) -> tuple[TorchCatalog, LeftBehind]:
        """See `Model`."""
        file = min(self.shards)
        padded = architecture_from_args(self.args, vocab=None, file=file).padded_vocab
        size = min(self.vocab or vocab or padded, padded)
        architecture = architecture_from_args(self.args, vocab=size, file=file)
        if self.is_untied:
            architecture = replace(architecture, tied=False)
        catalog, left_behind = open_catalog(
            self.shards,
            architecture,
            imported_experts=self.imported_experts,
            with_tied_copies=with_tied_copies,
            pinned=self.pinned,
        )
        return catalog, (*left_behind, *self.beside)


def open_torch(where: Where, world: World) -> TorchModel:
    """Read the headers of all shards, each by one rank that sees it.

    Raises:
        CheckpointNotFound, SourceError: there is none, or it cannot be converted as it is.
    """
    directory = _shared_iteration(where.path, where.ckpt_dir_name, world, where.name_flag)
    found = discover(
        world,
        directory,
        rank_files(directory) if directory.is_dir() else (),
        lambda file: shard_to_json(read_shard(directory / file, file)),
        expected=f"mp_rank_00/model_optim_rng.pt or the like in {directory}",
    )
    shards = {file: shard_from_json(header) for file, header in found.headers.items()}
    check_same_run(shards.values())
    file = min(shards)
    args = shards[file].args
    tokenizer = _share_tokenizer(where, world, args, directory)
    padded = architecture_from_args(args, vocab=None, file=file).padded_vocab
    vocab, who = true_vocab(flag=where.true_vocab_size, args=args, tokenizer=tokenizer.size, padded=padded, file=file)
    says = None if who == "padded size" else vocab
    beside = _beside(world, directory, found.headers_of[world.rank])
    return TorchModel(directory, found, shards, tokenizer, says, where.habana_imported_experts, beside)


def _beside(world: World, directory: Path, mine: Sequence[str]) -> LeftBehind:
    """Files in the rank directories that hold no weights, each counted by the rank that read the header beside it."""
    counts, sizes_bytes = Counter[str](), Counter[str]()
    listings: list[list[dict[str, int]]] = gather_objects(world, [files_beside(directory, file) for file in mine])
    for name, size_bytes in (item for of_rank in listings for found in of_rank for item in found.items()):
        counts[name] += 1
        sizes_bytes[name] += size_bytes
    return tuple((name, counts[name], sizes_bytes[name]) for name in sorted(counts))


def _share_tokenizer(where: Where, world: World, args: Mapping[str, Any], directory: Path) -> Tokenizer:
    """Rank 0's view of the tokenizer: its path may exist there only, and all ranks must plan alike."""
    found = find_tokenizer(where.tokenizer, args, directory) if world.rank == 0 else Tokenizer("none")
    shared = gather_objects(world, asdict(replace(found, path=None)))[0]
    return Tokenizer(**{**shared, "path": found.path})


def _shared_iteration(root: Path, name: str | None, world: World, name_flag: str = NAME_FLAG) -> Path:
    """The iteration's directory; training leaves the tracker file on one node, so any rank's tracker speaks for all.

    Args:
        root, name, name_flag: see `iteration_directory`.
        world: this rank.

    Raises:
        InconsistentShards: trackers name different iterations.
        CheckpointNotFound, UnsupportedModel: see `iteration_directory`, where no rank has the directory.
    """
    if name is None:
        tracked = [named for named in gather_objects(world, tracked_name(root, name_flag)) if named is not None]
        if len(set(tracked)) > 1:
            raise InconsistentShards(
                "tracker files of different nodes name different iterations",
                file=TRACKER_FILE,
                found=", ".join(sorted(set(tracked))),
                remedy=f"name the iteration with {name_flag}",
            )
        name = tracked[0] if tracked else None
    is_here = name is not None and (root / name).is_dir()
    anywhere = any(gather_objects(world, is_here))
    if is_here or not anywhere:
        return iteration_directory(root, name, name_flag)
    return root / name if name else root
