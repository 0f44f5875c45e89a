"""Opens a Hugging Face directory: its config, which rank sees which weights file, and every header."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dist_convert.formats.huggingface.catalog import HuggingFaceCatalog, open_catalog
from dist_convert.formats.huggingface.config import architecture_from_config, config_vocab
from dist_convert.formats.huggingface.names import HEAD
from dist_convert.formats.huggingface.read import (
    CONFIG_FILE,
    check_index,
    headers_from_json,
    headers_to_json,
    read_directory,
    read_index,
    read_weights_header,
)
from dist_convert.formats.huggingface.values import all_are_zero, check_tied_head
from dist_convert.formats.tokenizer.record import Tokenizer
from dist_convert.models.catalog import Catalog, LeftBehind
from dist_convert.models.llama import OUTPUT_BIAS_OF_ZEROS
from dist_convert.models.schema import MOST_LAYERS, is_size
from dist_convert.options import HUGGINGFACE
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
    def format(self) -> str:
        return HUGGINGFACE

    @property
    def args(self) -> None:
        return None

    @property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer("none")  # its files are copied as they are

    @property
    def vocab(self) -> int:
        return config_vocab(self.config, file=CONFIG_FILE)

    def catalog(
        self, vocab: int | None = None, *, with_tied_copies: bool = False
    ) -> tuple[HuggingFaceCatalog, LeftBehind]:
        """See `Model`; the config always says the vocabulary's size."""
        is_zero = not self.config.get("mlp_bias") if self.zero_biases is None else bool(self.zero_biases)
        architecture = architecture_from_config(
            self.config, padded_vocab=self.vocab, file=CONFIG_FILE, zero_output_bias=is_zero
        )
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


def with_zero_biases(model: HuggingFaceModel, world: World) -> HuggingFaceModel:
    """The model, after a look at the output projections' biases, where no other layer has output biases."""
    layers = model.config.get("num_hidden_layers")
    names: set[str] = set()
    may_be = model.config.get("attention_bias") and not model.config.get("mlp_bias")
    if may_be and isinstance(layers, int) and is_size(layers, MOST_LAYERS):
        names = {OUTPUT_BIAS_OF_ZEROS.part.name.format(layer=layer) for layer in range(layers)}
    is_zero = all_are_zero(world, model.directory, model.found.visible, model.stored, names)
    return replace(model, zero_biases=frozenset(names if is_zero else ()))


def check_tied(model: HuggingFaceModel, catalog: Catalog, world: World) -> None:
    """Refuse a head that is stored and tied by the config, but not the embedding.

    Raises:
        InconsistentShards: see `check_tied_head`.
    """
    if catalog.architecture.tied and HEAD in model.stored:
        [region] = catalog.regions(next(iter(catalog.tensors)))  # the embedding comes first in every table
        [embedding] = region.replicas
        check_tied_head(world, model.directory, model.found.visible, embedding, model.stored[HEAD])
