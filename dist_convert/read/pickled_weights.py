"""The header of a `pytorch_model.bin`: the pickle and the zip's directory, nothing run and no data read.

Format: https://docs.pytorch.org/docs/stable/notes/serialization.html; storages: docs/formats.md, "Storages".
"""

from __future__ import annotations

from pathlib import Path

from dist_convert.errors import UnsupportedModel
from dist_convert.read.pickle_records import Tensor
from dist_convert.read.saved_tensors import open_saved, place_tensors
from dist_convert.records import StoredTensor


def read_pickled_weights(path: Path, file: str) -> dict[str, StoredTensor]:
    """Every tensor of the file, by name, with the strides that it was saved with.

    Args:
        path: the file on this machine.
        file: how messages and the tensors name it.

    Raises:
        CorruptFile, UnsafePickle: see `zip_container` and `restricted_pickle`; or a tensor outside its storage.
        UnsupportedModel: no flat dict of tensors, or of a big-endian machine.
    """
    container, saved = open_saved(path, file)
    others = [
        f"{name}: {type(value).__name__}"
        for name, value in saved.items()
        if not (isinstance(name, str) and isinstance(value, Tensor))
    ]
    if others:
        raise UnsupportedModel(
            "a weights file that holds more than tensors by name",
            file=file,
            expected="the flat dict of tensors that save_pretrained writes",
            found=", ".join(others[:8]) + (f" and {len(others) - 8} more" if len(others) > 8 else ""),
            remedy="load the model with transformers and save it with save_pretrained",
        )
    return place_tensors(saved, container)
