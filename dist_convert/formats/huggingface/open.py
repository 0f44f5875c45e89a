"""Opens a Hugging Face directory: its config, which rank sees which weights file, and every header.

What it says of itself that Megatron has no place for (special ids, sampling defaults, keys that only transformers
reads) is carried along in a Megatron checkpoint's iteration, and comes back when that is converted again.

Some values must be known before a conversion can be planned, too. A head that should be tied: transformers 4 drops one
that is stored, transformers 5 warns and keeps it where its values differ, so it leaves open which model is meant
(docs/formats.md, "Shards and index"). Biases that should be zero: transformers' Llama stores an output bias wherever
queries, keys and values have biases; Megatron has no place for it where only those have them, and zeros need none.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dist_convert.errors import InconsistentShards, below
from dist_convert.formats.dcp.chunks import Stored
from dist_convert.formats.foreign import refuse_foreign_tensors
from dist_convert.formats.format import Model
from dist_convert.formats.huggingface import config as configs
from dist_convert.formats.huggingface import read as hf
from dist_convert.formats.huggingface.catalog import HuggingFaceCatalog, open_catalog, regions_of
from dist_convert.formats.huggingface.names import HEAD, OF_MTP
from dist_convert.formats.huggingface.quantised import QUANTISED_BY, Quantisation, quantisation_of, with_scales
from dist_convert.formats.megatron.iterations import CARRIED_FILE
from dist_convert.formats.samples import ALIKE, ALL_BYTES, are_equal, samples
from dist_convert.formats.tokenizer.record import Tokenizer, style_of
from dist_convert.models import FAMILIES
from dist_convert.models.blocks import MTP_KEY, OUTPUT_BIAS_OF_ZEROS
from dist_convert.models.catalog import Catalog, LeftBehind, Region
from dist_convert.models.schema import MOST_LAYERS, Architecture, copies_of, is_size
from dist_convert.options import DCP, HUGGINGFACE, Options
from dist_convert.ranks.collectives import World
from dist_convert.read.discover import Discovery, discover
from dist_convert.read.source import read_json
from dist_convert.records import JsonObject, StoredTensor, View


@dataclass(frozen=True)
class HuggingFaceModel:
    """A directory whose headers are read.

    Attributes:
        directory: as this rank sees it.
        config: the content of config.json, but for what it says of quantisation.
        found: its weights files.
        stored: every tensor by its name in them, those of codes with their scales.
        zero_biases: the output projections' biases, which are zeros and need no place in Megatron. None: nobody has
            looked; they are tensors that must be zero, where the MLPs have no biases, which a comparison finds out.
        drops_mtp: layers of multi-token prediction are left out.
        quantisation: of the weights, which are decoded.
        chunks: of a distributed checkpoint, by the tensors' names; `stored` then has whole tensors, as if each were in
            one stretch.
        beside: what a distributed checkpoint holds beside the model.
    """

    directory: Path
    config: JsonObject
    found: Discovery
    stored: Mapping[str, StoredTensor]
    zero_biases: frozenset[str] | None = None
    drops_mtp: bool = False
    quantisation: Quantisation | None = None
    chunks: Mapping[str, Stored] = field(default_factory=dict)
    beside: LeftBehind = ()
    args: None = None

    @property
    def format(self) -> str:
        return DCP if self.chunks else HUGGINGFACE

    @property
    def notes(self) -> tuple[str, ...]:
        return (f"weights are stored as {self.quantisation} and decoded to bf16",) if self.quantisation else ()

    @property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer("none")  # its files are copied as they are

    @property
    def vocab(self) -> int | None:
        """What config.json says; of one that says no size `catalog` tells what is wrong."""
        said = self.config.get("vocab_size")
        return said if isinstance(said, int) and is_size(said) else None

    def catalog(
        self, vocab: int | None = None, *, with_tied_copies: bool = False
    ) -> tuple[HuggingFaceCatalog, LeftBehind]:
        """See `Model`; the config always says the vocabulary's size."""
        is_zero = not self.config.get("mlp_bias") if self.zero_biases is None else bool(self.zero_biases)
        # transformers' classes count layers of multi-token prediction that they do not save.
        has_mtp = not self.drops_mtp and any(name.endswith(OF_MTP) for name in self.stored)
        config = self.config if has_mtp else {**self.config, MTP_KEY.config: 0}
        with below(self.directory):
            catalog, left_behind = open_catalog(
                self.stored,
                configs.architecture_from_config(config, zero_output_bias=is_zero),
                chunks=self.chunks,
                with_tied_copies=with_tied_copies,
                drops_mtp=self.drops_mtp,
            )
        if self.zero_biases:
            size_bytes = sum(self.stored[name].size_bytes for name in self.zero_biases)
            reason = "output bias of attention (all zeros)"
            left_behind = (*left_behind, (reason, len(self.zero_biases), size_bytes))
        return catalog, (*left_behind, *self.beside)


def open_huggingface(directory: Path, world: World, *, drops_mtp: bool = False) -> HuggingFaceModel:
    """Read the config and the headers of all weights files, each by one rank that sees it.

    Raises:
        CheckpointNotFound, SourceError: there is none, a damaged file, or files that are not those of the index.
    """
    with below(directory):
        weights = hf.find_weights(directory)
        config = hf.read_config(directory)
        found = discover(
            world,
            directory,
            [file for file in weights if (directory / file).is_file()],
            lambda file: {file: hf.header_to_json(hf.read_weights_header(directory / file, file))},
            expected="safetensors or pytorch_model files",
        )
        headers = {file: hf.header_from_json(file, header[file]) for file, header in found.headers.items()}
        refuse_foreign_tensors(headers, directory)
        if (index := hf.read_index(directory)[1]) is not None:
            hf.check_index(index, headers)
        stored = {name: tensor for tensors in headers.values() for name, tensor in tensors.items()}
        found = found.with_checksums(stored.values())
        quantisation = quantisation_of(config)
        stored = with_scales(stored, quantisation, found.visible)
    config = {name: value for name, value in config.items() if name != QUANTISED_BY}
    return HuggingFaceModel(directory, config, found, stored, drops_mtp=drops_mtp, quantisation=quantisation)


def check_tied(model: HuggingFaceModel, catalog: Catalog, world: World) -> None:
    """Refuse a copy of embedding or head that differs from it.

    A head may be tied by the config; layers of multi-token prediction hold both once more.

    Raises:
        InconsistentShards: they differ.
    """
    architecture = catalog.architecture
    if architecture.tied and HEAD in model.stored:
        embedding = next(iter(catalog.tensors))  # it comes first in every table
        what = "config.json ties the head to the embedding, but the model stores a head that differs"
        remedy = "set tie_word_embeddings to false in config.json if the head is the model's, else save without a head"
        _check_equal(model, catalog.regions(embedding), model.stored[HEAD], world, what, remedy)
    for name, copies in copies_of(FAMILIES[architecture.family], architecture).items():
        for copy in (copy for copy in copies if copy in model.stored):
            what = "a layer of multi-token prediction has an embedding or head that differs from the model's"
            remedy = "Megatron has one for all layers: leave these layers out with --drop-mtp"
            _check_equal(model, catalog.regions(name), model.stored[copy], world, what, remedy)


def _check_equal(
    model: HuggingFaceModel, own: Sequence[Region], copy: StoredTensor, world: World, what: str, remedy: str
) -> None:
    both = own, regions_of((View.of(copy),), model.chunks)
    places = [[replace(region.replicas[0], tensor="") for region in one] for one in both]
    if places[0] == places[1]:
        return  # one storage, as torch saves tied parameters
    shape = own[-1].box.row_end, own[-1].box.column_end
    found = "another dtype or shape"
    if (places[0][0].dtype, shape) == (copy.dtype, copy.shape):
        if are_equal(model.directory, model.found, *both, world):
            return
        found = "other values"
    file, same = model.directory / copy.file, own[0].replicas[0]
    expected = f"the same values as {same.tensor} in {model.directory / same.file}"
    raise InconsistentShards(what, file, expected, found, remedy, tensor=copy.name)


def with_zero_biases(model: HuggingFaceModel, world: World) -> HuggingFaceModel:
    """The model, after a look at the output projections' biases, where no other layer has output biases."""
    layers = model.config.get("num_hidden_layers")
    may_be = model.config.get("attention_bias") and not model.config.get("mlp_bias")
    names = []
    if may_be and isinstance(layers, int) and is_size(layers, MOST_LAYERS):
        names = [OUTPUT_BIAS_OF_ZEROS.parts[0].name.format(layer=layer) for layer in range(layers)]
    stored = (model.stored[name] for name in names if name in model.stored)
    biases = [bias for bias in stored if len(bias.shape) == 1 and bias.elements]
    are_zero = False
    if names and len(biases) == len(names):
        views = [one.replicas[0] for bias in biases for one in regions_of((View.of(bias),), model.chunks)]
        wanted = [(view, view.dtype) for view in views]
        digests = samples(model.directory, model.found, wanted, world, sample_bytes=ALL_BYTES)
        are_zero = all(digest.startswith(ALIKE) and not digest.removeprefix(ALIKE).strip("0") for digest in digests)
    return replace(model, zero_biases=frozenset(names if are_zero else ()))


def carried_configs(model: Model) -> dict[str, dict[str, Any]]:
    """File name to content: config.json and generation_config.json of a model, or of the one that it was made from.

    Raises:
        SourceError: a file of them is damaged.
    """
    if model.args is None:
        found: dict[str, Any] = {hf.CONFIG_FILE: dict(model.config or {})}
        if (model.directory / hf.GENERATION_FILE).is_file():
            hf.check_inside(model.directory, hf.GENERATION_FILE)
            found[hf.GENERATION_FILE] = read_json(model.directory / hf.GENERATION_FILE)
        return found
    return read_carried(model.directory)


def read_carried(directory: Path) -> dict[str, dict[str, Any]]:
    """The same of what lies beside an iteration's weights, if anything; a SourceError if that is damaged."""
    path = directory / CARRIED_FILE
    found = read_json(path) if path.is_file() else {}
    return {name: found[name] for name in (hf.CONFIG_FILE, hf.GENERATION_FILE) if isinstance(found.get(name), dict)}


def configs_of(model: Model, architecture: Architecture, dtype: str, job: Options) -> dict[str, dict[str, Any]]:
    """File name to content: config.json of what a model becomes and, but for a copy, generation_config.json.

    `dtype` is the safetensors name of most weights of the target; `job` says what the model is like.

    Raises:
        SourceError: a file that the model carries along is damaged.
    """
    if isinstance(model, HuggingFaceModel):
        counts = {MTP_KEY.config, *MTP_KEY.aliases} & model.config.keys() if model.drops_mtp else ()
        return {
            hf.CONFIG_FILE: configs.config_of_copy({**model.config, **dict.fromkeys(counts, 0)}, architecture, dtype)
        }
    carried, tokenizer = read_carried(model.directory), model.tokenizer
    is_carried = model.config is None and configs.describes(carried.get(hf.CONFIG_FILE, {}), architecture)
    given = carried[hf.CONFIG_FILE] if is_carried else model.config
    config = configs.config_like(given, architecture, dtype) if given else configs.config_json(architecture, dtype)
    path = job.like or tokenizer.path
    if is_carried and path is None and hf.GENERATION_FILE in carried:
        return {hf.CONFIG_FILE: config, hf.GENERATION_FILE: carried[hf.GENERATION_FILE]}
    return configs.with_special_ids(config, {}, tokenizer, style_of(tokenizer, config, job), path)
