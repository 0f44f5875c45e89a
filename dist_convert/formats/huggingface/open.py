"""Opens a Hugging Face directory: its config, which rank sees which weights file, and every header."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_convert.formats.huggingface.catalog import HuggingFaceCatalog, open_catalog
from dist_convert.formats.huggingface.config import architecture_from_config, config_vocab
from dist_convert.formats.huggingface.read import (
    check_index,
    find_weights,
    header_from_json,
    header_to_json,
    read_config,
    read_index,
    read_weights_header,
)
from dist_convert.models.catalog import LeftBehind
from dist_convert.ranks.collectives import World
from dist_convert.read.discover import Discovery, discover
from dist_convert.records import StoredTensor


@dataclass(frozen=True)
class HuggingFaceModel:
    """A directory whose headers are read.

    Attributes:
        directory: as this rank sees it.
        config: the content of config.json.
        found: its weights files.
        stored: every tensor by its name in them.
        zero_biases: the output projections' biases, which are zeros and need no place in Megatron. None: nobody has
            looked; they are tensors that must be zero, where the MLPs have no biases, which a comparison finds out.
    """

    directory: Path
    config: Mapping[str, Any]
    found: Discovery
    stored: Mapping[str, StoredTensor]
    zero_biases: frozenset[str] | None = None

    @property
    def args(self) -> None:
        return None

    @property
    def vocab(self) -> int:
        return config_vocab(self.config)

    def catalog(
        self, vocab: int | None = None, *, with_tied_copies: bool = False
    ) -> tuple[HuggingFaceCatalog, LeftBehind]:
        """See `Model`; the config always says the vocabulary's size."""
        is_zero = not self.config.get("mlp_bias") if self.zero_biases is None else bool(self.zero_biases)
        architecture = architecture_from_config(self.config, zero_output_bias=is_zero)
        catalog, left_behind = open_catalog(self.stored, architecture, with_tied_copies=with_tied_copies)
        if self.zero_biases:
            size_bytes = sum(self.stored[name].size_bytes for name in self.zero_biases)
            reason = "output bias of attention (all zeros)"
            left_behind = (*left_behind, (reason, len(self.zero_biases), size_bytes))
        return catalog, left_behind


def open_huggingface(directory: Path, world: World) -> HuggingFaceModel:
    """Read the config and the headers of all weights files, each by one rank that sees it.

    Raises:
        CheckpointNotFound, SourceError: there is none, a damaged file, or files that are not those of the index.
    """
    weights = find_weights(directory)
    config = read_config(directory)
    found = discover(
        world,
        directory,
        [file for file in weights if (directory / file).is_file()],
        lambda file: {file: header_to_json(read_weights_header(directory / file, file))},
        expected=f"safetensors or pytorch_model files in {directory}",
    )
    headers = {file: header_from_json(file, header[file]) for file, header in found.headers.items()}
    index = read_index(directory)
    if index is not None:
        check_index(index, headers)
    stored = {name: tensor for tensors in headers.values() for name, tensor in tensors.items()}
    return HuggingFaceModel(directory, config, found, stored)
