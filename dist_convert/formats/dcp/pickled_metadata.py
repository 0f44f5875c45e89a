"""`.metadata` of a distributed checkpoint, in the classes of torch.distributed.checkpoint."""

from collections.abc import Mapping

from dist_convert.formats.pickles import Called, Instance, Items, Named, pickled
from dist_convert.read.dcp import Blob, SavedTensor
from dist_convert.read.restricted_pickle import DTYPES

_MODULE = "torch.distributed.checkpoint.metadata"


_TORCH_NAMES = {dtype: name for name, dtype in DTYPES.items() if not name.endswith("Storage")}


def metadata_bytes(
    tensors: Mapping[str, SavedTensor], objects: Mapping[str, Blob], *, has_paths: bool = False
) -> bytes:
    """What `read.dcp.read_metadata` and torch read as these tensors and objects.

    `has_paths` says where in a state dict each tensor belongs, as `dcp_to_torch_save` wants it: under its own key.
    """
    state = [(key, _tensor(tensor)) for key, tensor in tensors.items()]
    state += [(key, Instance(Named(_MODULE, "BytesStorageMetadata"), None)) for key in objects]
    places = [(_index(key, None), _place(blob)) for key, blob in objects.items()]
    places += [
        (_index(key, chunk.offsets), _place(chunk.blob)) for key, tensor in tensors.items() for chunk in tensor.chunks
    ]
    metadata = {
        "state_dict_metadata": Items(state),
        "planner_data": Items([(key, (key,)) for key in tensors]) if has_paths else None,
        "storage_data": Items(places),
        "storage_meta": None,
        "version": "1.0.0",
    }
    return pickled(Instance(Named(_MODULE, "Metadata"), metadata), once=True)


def _size(numbers: tuple[int, ...]) -> Called:
    return Called(Named("torch", "Size"), (numbers,))


def _tensor(tensor: SavedTensor) -> Instance:
    strided = Called(Named("torch.serialization", "_get_layout"), ("torch.strided",))
    preserve = Called(Named(_MODULE, "_MEM_FORMAT_ENCODING"), (0,))  # of torch.contiguous_format
    dtype = Named("torch", _TORCH_NAMES[tensor.dtype])
    properties = Instance(Named(_MODULE, "TensorProperties"), (dtype, strided, False, preserve, False))
    chunks = [
        Instance(Named(_MODULE, "ChunkStorageMetadata"), {"offsets": _size(chunk.offsets), "sizes": _size(chunk.sizes)})
        for chunk in tensor.chunks
    ]
    state = {"properties": properties, "size": _size(tensor.shape), "chunks": chunks}
    return Instance(Named(_MODULE, "TensorStorageMetadata"), state)


def _index(key: str, offsets: tuple[int, ...] | None) -> Instance:
    offset = None if offsets is None else _size(offsets)
    return Instance(Named(_MODULE, "MetadataIndex"), {"fqn": key, "offset": offset, "index": None})


def _place(blob: Blob) -> Instance:
    state = {"relative_path": blob.file, "offset": blob.offset_bytes, "length": blob.size_bytes}
    return Instance(Named("torch.distributed.checkpoint.filesystem", "_StorageInfo"), state)
