"""Opens a Hugging Face directory: its config, which rank sees which weights file, and every header."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_convert.formats.huggingface.catalog import HuggingFaceCatalog, open_catalog
from dist_convert.formats.huggingface.config import architecture_from_config, config_vocab
from dist_convert.model import LeftBehind
from dist_convert.ranks.collectives import World
from dist_convert.read.discover import Discovery, discover
from dist_convert.read.huggingface import (
    CONFIG_FILE,
    check_index,
    headers_from_json,
    headers_to_json,
    read_directory,
    read_index,
    read_weights_header,
)
from dist_convert.records import StoredTensor


@dataclass(frozen=True)
class HuggingFaceModel:
    """A directory whose headers are read.

    Attributes:
        directory: as this rank sees it.
        config: the content of config.json.
        found: its weights files.
        stored: every tensor by its name in them.
    """

    directory: Path
    config: Mapping[str, Any]
    found: Discovery
    stored: Mapping[str, StoredTensor]

    @property
    def vocab(self) -> int:
        return config_vocab(self.config, file=CONFIG_FILE)

    def catalog(
        self, *, zero_output_bias: bool | None = None, with_tied_copies: bool = False
    ) -> tuple[HuggingFaceCatalog, LeftBehind]:
        """The directory as a catalog, and what of it is no part of the model.

        Args:
            zero_output_bias: the output projections' biases are zeros. None: they are read as tensors that must be
                zero, where the MLPs have no biases, which a comparison finds out.
            with_tied_copies: a stored head of a tied model counts as another copy of the embedding.

        Raises:
            SourceError: all that config and headers show to be wrong.
        """
        is_zero = not self.config.get("mlp_bias") if zero_output_bias is None else zero_output_bias
        architecture = architecture_from_config(
            self.config, padded_vocab=self.vocab, file=CONFIG_FILE, zero_output_bias=is_zero
        )
        return open_catalog(self.stored, architecture, with_tied_copies=with_tied_copies)


def open_huggingface(directory: Path, world: World) -> HuggingFaceModel:
    """Read the config and the headers of all weights files, each by one rank that sees it.

    Raises:
        CheckpointNotFound, SourceError: there is none, a damaged file, or files that are not those of the index.
    """
    seen = read_directory(directory)
    found = discover(
        world,
        directory,
        seen.sizes_bytes,
        lambda file: headers_to_json({file: read_weights_header(directory / file, file)}),
        expected=f"safetensors or pytorch_model files in {directory}",
    )
    headers = {file: headers_from_json(header)[file] for file, header in found.headers.items()}
    index = read_index(directory)
    if index is not None:
        check_index(index, headers)
    stored = {name: tensor for tensors in headers.values() for name, tensor in tensors.items()}
    return HuggingFaceModel(directory, seen.config, found, stored)
