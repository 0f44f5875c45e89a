"""Opens Meta's files: their headers, what params.json says, and whether they belong together.

Of each matrix a file has some rows or some columns, of the norms all.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from math import prod
from pathlib import Path

from dist_convert.errors import ConversionError, InconsistentShards, MissingShard, WrongShape, below, raise_together
from dist_convert.formats.dcp.chunks import Stored, StoredChunk
from dist_convert.formats.dcp.names import huggingface_tensors
from dist_convert.formats.huggingface.catalog import HuggingFaceCatalog, open_catalog, regions_of
from dist_convert.formats.huggingface.config import config_json, special_token_ids
from dist_convert.formats.huggingface.read import header_from_json, header_to_json, read_weights_header
from dist_convert.formats.megatron.args import check_own_vocab
from dist_convert.formats.megatron.parameters import dtype_problems
from dist_convert.formats.megatron.said import said_of
from dist_convert.formats.meta.names import DROPPED, EMBEDDING, GATE, HEAD, QUERY
from dist_convert.formats.meta.params import PARAMS_FILE, args_of_params, weights_files
from dist_convert.formats.samples import ALIKE, are_equal, samples
from dist_convert.formats.tokenizer.find import shared_tokenizer
from dist_convert.formats.tokenizer.record import Tokenizer
from dist_convert.models.catalog import LeftBehind, Where
from dist_convert.options import META
from dist_convert.ranks.collectives import World, gather_objects
from dist_convert.read.discover import Discovery, discover
from dist_convert.read.source import read_json
from dist_convert.records import JsonObject, StoredTensor, View, names

#: For each file, its tensors by name.
Headers = Mapping[str, Mapping[str, StoredTensor]]


@dataclass(frozen=True)
class MetaModel:
    """Meta's files whose headers are read.

    Attributes:
        directory: as this rank sees it.
        found: its weights files.
        content, left_behind: what they hold of the model, and besides.
        config: the content of a config.json of the model.
        tokenizer: the one beside the files, or that the user names, as rank 0 sees it.
        notes: what the user should know.
    """

    directory: Path
    found: Discovery
    content: HuggingFaceCatalog
    left_behind: LeftBehind
    config: JsonObject
    tokenizer: Tokenizer
    notes: tuple[str, ...] = ()
    args: None = None
    format: str = META

    @property
    def vocab(self) -> int:
        return self.content.architecture.vocab

    def catalog(
        self, vocab: int | None = None, *, with_tied_copies: bool = False
    ) -> tuple[HuggingFaceCatalog, LeftBehind]:
        """See `Model`; the embedding has no padding."""
        return self.content, self.left_behind


def read_headers(directory: Path, world: World) -> tuple[Discovery, Headers, JsonObject]:
    """The files, the headers of all, each read by one rank, and params.json.

    Raises:
        SourceError: one is damaged, or nodes have different ones.
    """
    with below(directory):
        found = discover(
            world,
            directory,
            weights_files(directory),
            lambda file: header_to_json(read_weights_header(directory / file, file)),
            expected=f"consolidated.00.pth and so on in {directory}",
        )
    headers = {file: header_from_json(file, header) for file, header in sorted(found.headers.items())}
    expected = [f"consolidated.{number:02d}.pth" for number in range(len(headers))]
    if list(headers) not in (expected, ["consolidated.safetensors"]):
        what = "the files are not those of one model"
        remedy = "copy the missing file from where the model came from, or move the extra one elsewhere"
        raise MissingShard(what, directory, expected=", ".join(expected), found=", ".join(headers), remedy=remedy)
    is_here = (directory / PARAMS_FILE).is_file()
    told = gather_objects(world, read_json(directory / PARAMS_FILE) if is_here else None)
    seen = [(rank, one) for rank, one in enumerate(told) if one is not None]
    first, params = seen[0]
    if other := next((rank for rank, one in seen if one != params), None):
        raise InconsistentShards(
            "two ranks see different files under one name",
            directory / PARAMS_FILE,
            expected=f"the values that rank {first} sees",
            found=f"others on rank {other}",
            remedy="copy the model's own to all nodes",
        )
    found = found.with_checksums(one for tensors in headers.values() for one in tensors.values())
    inner = params.get("model")
    return found, headers, inner if isinstance(inner, Mapping) else params


def open_meta(where: Where, world: World) -> MetaModel:
    """The model in a directory of Meta's files.

    Raises:
        SourceError: all that the headers show to be wrong, or files that do not belong together.
        UsageError: flags that contradict them.
    """
    found, headers, params = read_headers(where.path, world)
    tied = _is_tied(where.path, found, headers, world)
    with below(where.path):
        family, args = args_of_params(params, rows_of(headers), tied=tied)
        if where.like is not None:
            del args["max_position_embeddings"]  # which params.json does not say
        said = said_of(replace(where, family=family), args, PARAMS_FILE)
        architecture = said.architecture(vocab=None, file=PARAMS_FILE)
        chunks = huggingface_tensors(tensors_of(headers, architecture.hidden), architecture)
        whole = {name: replace(tensor.whole, name=name) for name, tensor in chunks.items()}
        content, left_behind = open_catalog(whole, architecture, chunks=chunks)
    if dropped := [held[DROPPED].size_bytes for held in headers.values() if DROPPED in held]:
        left_behind = (*left_behind, ("rotary frequencies", len(dropped), sum(dropped)))
    vocab, file = architecture.vocab, str(where.path / PARAMS_FILE)
    tokenizer, wanted = shared_tokenizer(where, args, where.path, world, padded=vocab, file=file)
    check_own_vocab(wanted, vocab)
    config = said.config
    if config is None:
        bos, eos = special_token_ids(family, vocab, tokenizer, instruct=False)
        config = config_json(architecture, content.params_dtype) | {"bos_token_id": bos, "eos_token_id": eos}
    notes = list(said.notes)
    if where.like is None:
        notes.append(
            f"{architecture.max_positions} positions, the usual number for this model; --like CONFIG changes it"
        )
    content = replace(content, layout="Meta's layout")
    model = MetaModel(where.path, found, content, left_behind, config, tokenizer)
    if differing := _differing_norms(model, headers, world):
        notes.append(f"warning: norms differ between files; the first file's are used: {names(differing)}")
    return replace(model, notes=tuple(notes))


def tensors_of(headers: Headers, hidden: int) -> dict[str, Stored]:
    """The tensors by Meta's names, put together from all files; a vector is the first file's.

    A matrix is cut along its rows if these have the hidden size in each file, else along its columns.

    Raises:
        Problems, or the one problem there is: pieces that do not fit each other, or are no floats.
    """
    found: dict[str, Stored] = {}
    problems: list[ConversionError] = []
    for name in dict.fromkeys(name for held in headers.values() for name in held if name != DROPPED):
        pieces = [held[name] for held in headers.values() if name in held]
        shapes = [piece.shape for piece in pieces]
        axis = int(all(shape[1:] and shape[1] != hidden for shape in shapes))
        alike = {shape if len(shape) == 1 else shape[1 - axis :][:1] for shape in shapes}
        if len(shapes) < len(headers) or len(shapes[0]) not in (1, 2) or len(alike) > 1 or not all(map(prod, shapes)):
            what, remedy = "the pieces of a tensor do not fit each other", "a file is of another model: copy all again"
            file = next((file for file, held in headers.items() if name not in held), pieces[0].file)
            wanted, here = "a vector, or as many rows or columns in each file", ", ".join(str([*s]) for s in shapes)
            problems.append(WrongShape(what, file, tensor=name, expected=wanted, found=here, remedy=remedy))
            continue
        problems += [problem for piece in pieces for problem in dtype_problems(View.of(piece), pieces[0].dtype)]
        chunks, end = [], 0
        for piece in pieces if len(shapes[0]) == 2 else pieces[:1]:
            offsets = (0, end) if axis else (end, 0)[: len(piece.shape)]
            chunks.append(StoredChunk(offsets, piece))
            end += piece.shape[axis]
        shape = (shapes[0][0], end) if axis else (end, *shapes[0][1:])
        found[name] = Stored(name, pieces[0].dtype, shape, tuple(chunks))
    raise_together(problems)
    return found


def rows_of(headers: Headers) -> dict[str, int]:
    """Of the tensors that tell a model's sizes, the rows in all files together."""
    held = {name: [of[name].shape for of in headers.values() if name in of] for name in (QUERY, GATE, HEAD)}
    return {name: sum(shape[0] for shape in shapes if shape) for name, shapes in held.items()}


def _is_tied(directory: Path, found: Discovery, headers: Headers, world: World) -> bool:
    """Whether the head is the embedding, as in Llama 3.2's small models, which are single files."""
    tensors, *others = headers.values()
    pair = [tensors[name] for name in (EMBEDDING, HEAD) if name in tensors and len(tensors[name].shape) == 2]
    if others or len(pair) < 2 or len({(one.dtype, one.shape) for one in pair}) > 1:
        return False
    embedding, head = (regions_of((View.of(one),), {}) for one in pair)
    return are_equal(directory, found, embedding, head, world)


def _differing_norms(model: MetaModel, headers: Headers, world: World) -> list[str]:
    """The norms whose copies differ between files: those of some published models do, by a little."""
    tensors, *_ = headers.values()
    norms = [name for name, one in tensors.items() if len(one.shape) == 1 and name != DROPPED]
    views = [View.of(held[name]) for name in (QUERY, *norms) for held in headers.values()]
    digests = iter(samples(model.directory, model.found, [(view, view.dtype) for view in views], world))
    of_digest: dict[str, str] = {}
    for file, digest in zip(headers, islice(digests, len(headers)), strict=True):
        twin = of_digest.setdefault(digest, file)
        if twin != file and not digest.startswith(ALIKE):
            what, found = "two files hold the same weights", f"the rows of {model.directory / twin}"
            remedy = "one was copied under the other's name: copy the right one again from where it came from"
            raise InconsistentShards(what, model.directory / file, tensor=QUERY, found=found, remedy=remedy)
    return [name for name in norms if len({next(digests) for _ in headers}) > 1]
