"""The catalog of a `torch_dist` checkpoint: where each box of each tensor is stored, in which blobs."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dist_convert.errors import (
    ConversionError,
    InconsistentShards,
    MissingTensor,
    PlanError,
    WrongShape,
    raise_together,
)
from dist_convert.formats.dcp.chunks import Stored
from dist_convert.formats.megatron.args import added_to_norms
from dist_convert.formats.megatron.grid import Grid
from dist_convert.formats.megatron.names import TIED, has_fused_norm, normalise
from dist_convert.formats.megatron.parameters import (
    Parameter,
    Replica,
    cover_problems,
    dtype_problems,
    held_padding,
    held_regions,
    parameters_of,
    tensors_of,
    unknown_tensor,
)
from dist_convert.formats.torch_dist.names import KeyPiece, Keys, keys
from dist_convert.models import FAMILIES
from dist_convert.models.catalog import Region, TensorMeta
from dist_convert.models.schema import Architecture
from dist_convert.records import View

_WHOLE = Grid()


@dataclass(frozen=True)
class DistCatalog:
    """A `Catalog` of blobs.

    Attributes:
        architecture: the model.
        add_to_norms: 1 where norms are stored as gamma - 1.
        files: how many files there are.
        tensors: the logical tensors.
        parameters, replicas: see `parameters.Holder`; each parameter is one shard, stored once.
        params_dtype: in which most bytes are stored.
    """

    architecture: Architecture
    replicas: Mapping[str, Sequence[Sequence[Replica]]]
    add_to_norms: int
    files: int
    tensors: Mapping[str, TensorMeta]
    parameters: Mapping[str, tuple[Parameter, int]]
    params_dtype: str

    @property
    def is_owned(self) -> bool:
        return True

    @property
    def title(self) -> str:
        """The model, for people."""
        return f"{FAMILIES[self.architecture.family].hf_class}, torch_dist in {self.files} files"

    def regions(self, name: str) -> Sequence[Region]:
        return held_regions(self, name)

    def padding(self, name: str) -> Sequence[Region]:
        return held_padding(self, name)


def open_catalog(
    stored: Mapping[str, Stored], architecture: Architecture, args: Mapping[str, Any], file: str
) -> DistCatalog:
    """A checkpoint from what its files hold of the model.

    Args:
        stored: each tensor by its key, without what `reason_to_leave` names.
        architecture: the model, with the true vocabulary size.
        args: the training arguments.
        file: that names the keys, for messages.

    Raises:
        Problems, or the one problem there is: all that the headers show to be wrong.
    """
    by_name: dict[str, Stored] = {}
    for key, tensor in stored.items():
        if (other := by_name.setdefault(normalise(key), tensor)) is not tensor:
            raise InconsistentShards(f"{other.key} is stored twice", tensor=key, file=file, found=f"{other.key}, {key}")
    problems: list[ConversionError] = []
    replicas: dict[str, Sequence[Sequence[Replica]]] = {}
    dtypes: dict[str, str] = {}
    used: set[str] = set()
    bytes_of: Counter[str] = Counter()
    parameters = parameters_of(architecture, _WHOLE)
    for parameter in parameters:
        spelled = keys(parameter.row, parameter.layer, parameter.expert)
        present = [pieces for pieces in spelled if all(piece.key in by_name for piece in pieces)]
        used |= {piece.key for pieces in present for piece in pieces}
        try:
            pieces = _only(parameter, spelled, present, file)
            found = [one for piece in pieces for one in _stored_piece(parameter, architecture, piece, by_name)]
        except (MissingTensor, WrongShape, InconsistentShards, PlanError) as problem:
            if problem.tensor not in {known.tensor for known in problems}:  # of all layers and experts in it
                problems.append(problem)
            continue
        found.sort(key=lambda piece: piece[:2])  # regions are in the order of their rows
        replicas[parameter.name] = ((tuple(found),),)
        dtypes[parameter.name] = found[0][2].dtype
        for _, _, view in found:
            problems += dtype_problems(view, dtypes[parameter.name])
            bytes_of[view.dtype] += view.size_bytes
    family = FAMILIES[architecture.family]
    problems += [unknown_tensor(family, file, tensor.key) for name, tensor in by_name.items() if name not in used]
    raise_together(problems)
    raise_together(list(cover_problems(parameters)))
    params_dtype = bytes_of.most_common(1)[0][0]
    tensors, stacked = tensors_of(architecture, parameters, dtypes, params_dtype)
    files = len({chunk.place.file for tensor in stored.values() for chunk in tensor.chunks})
    # The local modules' norms have the same keys as those that Transformer Engine fuses.
    is_fused = args.get("transformer_impl") != "local" and any(map(has_fused_norm, by_name))
    added = added_to_norms(args, file, is_fused=is_fused)
    return DistCatalog(architecture, replicas, added, files, tensors, stacked, params_dtype)


def with_own_head(architecture: Architecture, args: Mapping[str, Any], stored: Mapping[str, Stored]) -> Architecture:
    """The architecture, whose head is not the embedding where it has a key: tied ones are stored once.

    Raises:
        InconsistentShards: the args say that both are tied.
    """
    head = next((key for key in stored if normalise(key) == TIED[1]), None)
    if head is None or not architecture.tied:
        return architecture
    if args.get("untie_embeddings_and_output_weights") is None:
        return replace(architecture, tied=False)
    raise InconsistentShards(
        "a head of its own beside args that tie it to the embedding",
        tensor=head,
        file=stored[head].whole.file,
        expected="no head, or untie_embeddings_and_output_weights in the args",
        found="untie_embeddings_and_output_weights false",
        remedy="the checkpoint is of another model than its args; find out which is right, and save it anew",
    )


def stored_args(args: Mapping[str, Any], stored: Mapping[str, Stored]) -> Mapping[str, Any]:
    """The args, with the rows of the embedding as it is stored: it may be padded otherwise than they say."""
    embedding = next((tensor for key, tensor in stored.items() if normalise(key) == TIED[0]), None)
    return args if embedding is None or not embedding.shape else {**args, "padded_vocab_size": embedding.shape[0]}


def _only(parameter: Parameter, spelled: Sequence[Keys], present: Sequence[Keys], file: str) -> Keys:
    """The one spelling of a parameter that is there."""
    if len(present) == 1:
        return present[0]
    if present:
        found = ", ".join(sorted({piece.key for pieces in present for piece in pieces}))
        raise InconsistentShards(f"{parameter.name} is stored twice", file=file, found=found)
    raise MissingTensor(
        f"no tensor for {parameter.name}",
        tensor=spelled[0][0].key,
        file=file,
        expected="one of " + ", ".join(dict.fromkeys(pieces[0].key for pieces in spelled)),
        found="nothing",
        remedy="the checkpoint is incomplete or of another model; copy it again",
    )


def _stored_piece(
    parameter: Parameter,
    architecture: Architecture,
    piece: KeyPiece,
    by_name: Mapping[str, Stored],
) -> Iterator[tuple[int, int, View]]:
    """The boxes of a parameter that a key holds, as they lie in it.

    Raises:
        WrongShape: the tensor has another shape than the args say.
        PlanError: its chunks do not make it up.
    """
    tensor, axes = by_name[piece.key], len(piece.index)
    rows, columns = parameter.cut.shard_size
    rows //= piece.parts
    whole = leading_axes(parameter, architecture, axes)
    if tensor.shape not in ([(*whole, rows, columns)] + [(*whole, rows)] * (columns == 1)):
        raise WrongShape(
            f"wrong shape for {parameter.name}",
            tensor=tensor.key,
            file=tensor.whole.file,
            expected=f"{[*whole, rows, columns] if columns > 1 else [*whole, rows]} from the args",
            found=f"{list(tensor.shape)}",
            remedy="the checkpoint is of another model, or the args are not those it was trained with",
        )
    for row, column, view in tensor.at(piece.index).pieces():
        yield piece.part * rows + row, column, view


def leading_axes(parameter: Parameter, architecture: Architecture, axes: int) -> tuple[int, ...]:
    """The sizes of the leading axes: layers, experts, or both."""
    sizes = (architecture.layers, architecture.experts) if parameter.expert is not None else (architecture.layers,)
    return sizes[len(sizes) - axes :]
