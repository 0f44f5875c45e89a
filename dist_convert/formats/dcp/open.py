"""Opens a plain distributed checkpoint, such as FSDP2 saves: a model with Hugging Face's names, in chunks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from dist_convert.errors import InconsistentShards, MissingArguments, below
from dist_convert.formats.dcp.headers import find_chunks, read_by_one, read_shards, shards_of, sort_out
from dist_convert.formats.dcp.names import find_prefix, huggingface_tensors, is_of_torchtitan, reason_to_leave
from dist_convert.formats.huggingface.config import architecture_from_config
from dist_convert.formats.huggingface.open import HuggingFaceModel
from dist_convert.formats.huggingface.quantised import QUANTISED_BY
from dist_convert.formats.huggingface.read import CONFIG_FILE, read_config
from dist_convert.formats.megatron.names import normalise
from dist_convert.models.catalog import Where
from dist_convert.ranks.collectives import World
from dist_convert.read.dcp import METADATA_FILE, Blob, SavedTensor, read_metadata
from dist_convert.records import names


def read_contents(directory: Path) -> dict[str, Any]:
    """The tensors of the model by their keys, what comes before their names, and what lies beside, in JSON values.

    Raises:
        CorruptFile, UnsafePickle: a damaged `.metadata`, or one that names what no checkpoint needs.
        UnsupportedModel, InconsistentShards: no model that is known, or several.
    """
    path = directory / METADATA_FILE
    metadata = read_shards(directory) if shards_of(directory) else read_metadata(path)

    def reason_of(key: str, saved: SavedTensor | Blob) -> str:
        if isinstance(saved, Blob):
            return reason_to_leave(key) or f"objects of {key.partition('.')[0]}"
        return reason_to_leave(key) or ("" if saved.shape else "numbers (no weights)")

    return {**sort_out(metadata, reason_of), "prefix": find_prefix(metadata.tensors, str(path))}


def open_dcp(where: Where, directory: Path, world: World) -> HuggingFaceModel:
    """Read `.metadata` on one rank that sees it, and each chunk's header on a rank that sees its file.

    Args:
        where: the checkpoint.
        directory: of its files, as this rank sees it.
        world: this rank.

    Raises:
        CheckpointNotFound, SourceError: it is incomplete, or cannot be converted as it is.
    """
    said = read_by_one(directory, world, read_contents)
    if where.like is None and not (directory / CONFIG_FILE).is_file():
        what = "a distributed checkpoint does not say what its model is"
        expected = f"{CONFIG_FILE} of the model beside {METADATA_FILE}"
        remedy = f"copy the {CONFIG_FILE} of the model that was trained there, or say where it is with --like"
        raise MissingArguments(what, directory, expected, found="none", remedy=remedy)
    given = where.like or read_config(directory)
    config = {name: value for name, value in given.items() if name != QUANTISED_BY}  # what is trained is not quantised
    found, stored = find_chunks(directory, said["tensors"], world)
    chunks = {normalise(key).removeprefix(said["prefix"]): tensor for key, tensor in stored.items()}
    if len(chunks) < len(stored):
        twice = names(sorted(key for key, tensor in stored.items() if tensor not in chunks.values()))
        raise InconsistentShards("tensors are stored twice", directory / METADATA_FILE, found=twice)
    if is_of_torchtitan(chunks):
        with below(directory):
            chunks = huggingface_tensors(chunks, architecture_from_config(config))
    return HuggingFaceModel(
        directory,
        config,
        found,
        {name: replace(tensor.whole, name=name) for name, tensor in chunks.items()},
        drops_mtp=where.asked.drop_mtp,
        chunks=chunks,
        beside=tuple(tuple(item) for item in said["beside"]),
    )
