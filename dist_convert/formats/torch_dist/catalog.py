"""The catalog of a `torch_dist` checkpoint: where each box of each tensor is stored, in which blobs."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from dist_convert import errors
from dist_convert.formats.dcp.chunks import Stored
from dist_convert.formats.megatron import parameters as params
from dist_convert.formats.megatron.args import added_to_norms
from dist_convert.formats.megatron.grid import Grid
from dist_convert.formats.megatron.names import TIED, has_fused_norm, normalise
from dist_convert.formats.torch_dist.names import KeyPiece, Keys, is_of_gates, keys
from dist_convert.models import FAMILIES
from dist_convert.models.schema import Architecture
from dist_convert.options import TORCH_DIST
from dist_convert.read.dcp import METADATA_FILE
from dist_convert.records import JsonObject, View

_WHOLE = Grid()


def open_catalog(
    stored: Mapping[str, Stored], architecture: Architecture, args: JsonObject, file: str, format: str = TORCH_DIST
) -> params.MegatronCatalog:
    """A checkpoint from what its files hold of the model: each parameter is one shard, stored once.

    Args:
        stored: each tensor by Megatron's name of it, without what `reason_to_leave` names.
        file: that names the keys, for messages.
        format: which of Megatron's distributed formats.

    Raises:
        Problems, or the one problem there is: all that the headers show to be wrong.
    """
    problems: list[errors.ConversionError] = []
    replicas: dict[str, Sequence[Sequence[params.Replica]]] = {}
    used = set[str]()
    parameters = params.parameters_of(architecture, _WHOLE)
    for parameter in parameters:
        spelled = keys(parameter.row, parameter.layer, parameter.expert)
        present = [pieces for pieces in spelled if all(piece.key in stored for piece in pieces)]
        used |= {piece.key for pieces in present for piece in pieces}
        try:
            pieces = _only(parameter, spelled, present, file)
            found = [one for piece in pieces for one in _stored_piece(parameter, architecture, piece, stored)]
        except (errors.SourceError, errors.PlanError) as problem:
            if problem.tensor not in {known.tensor for known in problems}:  # of all layers and experts in it
                problems.append(problem)
            continue
        found.sort(key=lambda piece: piece[:2])  # regions are in the order of their rows
        replicas[parameter.name] = ((tuple(found),),)
        for _, _, view in found:
            problems += params.dtype_problems(view, found[0][2].dtype)
    family = FAMILIES[architecture.family]
    problems += [params.unknown_tensor(family, file, tensor.key) for name, tensor in stored.items() if name not in used]
    errors.raise_together(problems)
    files = len({chunk.place.file for tensor in stored.values() for chunk in tensor.chunks})
    # The local modules' norms have the same keys as those that Transformer Engine fuses.
    is_fused = args.get("transformer_impl") != "local" and any(map(has_fused_norm, stored))
    catalog = params.MegatronCatalog(
        architecture=architecture,
        title=f"{family.hf_class}, {format} in {files} files",
        add_to_norms=added_to_norms(args, file, is_fused=is_fused),
        replicas=replicas,
    )
    return params.with_tensors(catalog, parameters)


def by_name(stored: Mapping[str, Stored], prefix: str) -> dict[str, Stored]:
    """Each tensor by Megatron's name of it, from its key, which may begin with a prefix.

    Raises:
        InconsistentShards: two keys have one name.
    """
    found: dict[str, Stored] = {}
    for key, tensor in stored.items():
        if (other := found.setdefault(normalise(key.removeprefix(prefix)), tensor)) is not tensor:
            twice = f"{other.key}, {key}"
            raise errors.InconsistentShards(f"{other.key} is stored twice", METADATA_FILE, tensor=key, found=twice)
    return found


def check_gates(stored: Mapping[str, Stored], args: JsonObject) -> None:
    """Refuse gates that FSDP did not take apart, as without --swiglu: their rows lie rank by rank, gate and up of each.

    Raises:
        UnsupportedModel
    """
    sizes = ("tensor_model_parallel_size", "expert_tensor_parallel_size")
    cut = next((name for name in sizes if args.get(name) not in (None, 1)), None)
    gates = [name for name in stored if is_of_gates(name) and not name.endswith(("_w", "_v"))]
    if cut is not None and gates:
        stacked = stored[gates[0]]
        what = "gate and up of each tensor parallel rank lie one after the other"
        expected, found = f"{stacked.key}_w and {stacked.key}_v, or {cut} 1", f"{cut} {args[cut]}"
        remedy = "load it with Megatron-LM, and save it with a tensor parallel size of 1"
        raise errors.UnsupportedModel(what, stacked.whole.file, expected, found, remedy, tensor=stacked.key)


def with_own_head(architecture: Architecture, args: JsonObject, stored: Mapping[str, Stored]) -> Architecture:
    """The architecture, whose head is not the embedding where it has a key: tied ones are stored once.

    Raises:
        InconsistentShards: the args say that both are tied.
    """
    head = stored.get(TIED[1])
    if head is None or not architecture.tied:
        return architecture
    if args.get("untie_embeddings_and_output_weights") is None:
        return replace(architecture, tied=False)
    raise errors.InconsistentShards(
        "a separate head, although the args tie it to the embedding",
        head.whole.file,
        tensor=head.key,
        expected="no head, or untie_embeddings_and_output_weights in the args",
        found="untie_embeddings_and_output_weights false",
        remedy="the model and the args disagree; find out which is right, and save the checkpoint again",
    )


def stored_args(args: JsonObject, stored: Mapping[str, Stored]) -> JsonObject:
    """The args, with the rows of the embedding as it is stored: it may be padded otherwise than they say."""
    embedding = stored.get(TIED[0])
    return args if embedding is None or not embedding.shape else {**args, "padded_vocab_size": embedding.shape[0]}


def _only(parameter: params.Parameter, spelled: Sequence[Keys], present: Sequence[Keys], file: str) -> Keys:
    """The one spelling of a parameter that is there."""
    if len(present) == 1:
        return present[0]
    if present:
        found = ", ".join(sorted({piece.key for pieces in present for piece in pieces}))
        raise errors.InconsistentShards(f"{parameter.name} is stored twice", file, found=found)
    what, remedy = f"no tensor for {parameter.name}", "the checkpoint is incomplete or of another model; copy it again"
    expected = "one of " + ", ".join(dict.fromkeys(pieces[0].key for pieces in spelled))
    raise errors.MissingTensor(what, file, expected, tensor=spelled[0][0].key, found="nothing", remedy=remedy)


def _stored_piece(
    parameter: params.Parameter, architecture: Architecture, piece: KeyPiece, stored: Mapping[str, Stored]
) -> Iterator[tuple[int, int, View]]:
    """The boxes of a parameter that a key holds, as they lie in it.

    Raises:
        WrongShape: the tensor has another shape than the args say.
        CorruptFile: its chunks do not make it up.
    """
    tensor, axes = stored[piece.key], len(piece.index)
    rows, columns = parameter.cut.shard_size
    rows //= piece.parts
    whole = leading_axes(parameter, architecture, axes)
    if tensor.shape not in ([(*whole, rows, columns)] + [(*whole, rows)] * (columns == 1)):
        what, found = f"wrong shape for {parameter.name}", f"{list(tensor.shape)}"
        expected = f"{[*whole, rows, columns] if columns > 1 else [*whole, rows]} from the args"
        remedy = "the checkpoint is of another model, or the args are not those it was trained with"
        raise errors.WrongShape(what, tensor.whole.file, expected, found, remedy, tensor=tensor.key)
    for row, column, view in tensor.at(piece.index).pieces():
        yield piece.part * rows + row, column, view


def leading_axes(parameter: params.Parameter, architecture: Architecture, axes: int) -> tuple[int, ...]:
    """The sizes of the leading axes: layers, experts, or both."""
    sizes = (architecture.layers, architecture.experts) if parameter.expert is not None else (architecture.layers,)
    return sizes[len(sizes) - axes :]
