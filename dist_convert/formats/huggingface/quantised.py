"""Weights that are stored quantised: which schemes are decoded, and where the scales of each weight are.

The files are believed, not what a config lists as left out: codes need scales, and nothing else has any. Names, shapes
and rules: docs/formats.md, "Quantised weights".
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from dist_convert.errors import ConversionError, MissingShard, MissingTensor, UnsupportedModel, raise_together
from dist_convert.formats.huggingface.read import CONFIG_FILE
from dist_convert.models.schema import is_size
from dist_convert.records import FilesOfRanks, JsonObject, Scales, StoredTensor, View, row_major

QUANTISED_BY = "quantization_config"
#: Ends of the names of codes and of their scales; what comes before is the weight's.
BLOCKS = "_blocks"
_SCALES = {"fp8": "_scale_inv", "mxfp4": "_scales"}
#: Of inference that quantises activations, too.
ACTIVATION_SCALE = ".activation_scale"
#: Codes of MXFP4 in a byte, and bytes of a block.
_PACKED, _BLOCK_BYTES = 2, 16
#: The dtypes of scales; a byte is a power of two.
_SCALE_DTYPES = {"F32": "F32", "BF16": "BF16", "F16": "F16", "F8_E8M0": "F8_E8M0", "U8": "F8_E8M0"}


@dataclass(frozen=True)
class Quantisation:
    """How weights are quantised: "fp8" or "mxfp4", with one scale for each block; 0 x 0 is a whole matrix."""

    method: str
    block_rows: int
    block_columns: int

    def __str__(self) -> str:
        block = f"blocks of {self.block_rows} x {self.block_columns}" if self.block_rows else "whole matrices"
        return f"{self.method.upper()} in {block}"


def quantisation_of(config: JsonObject) -> Quantisation | None:
    """What config.json says of its weights, None of plain ones; an UnsupportedModel for what is not decoded."""
    said = config.get(QUANTISED_BY)
    if not said:
        return None
    found = said if isinstance(said, Mapping) else {}
    method, block = found.get("quant_method"), found.get("weight_block_size", [128, 128])  # transformers' default
    is_block = isinstance(block, list) and len(block) == 2 and all(size and is_size(size) for size in block)
    if method == "mxfp4":
        return Quantisation(method, 1, _PACKED * _BLOCK_BYTES)
    if method == "fp8" and found.get("fmt", "e4m3") == "e4m3" and (is_block or block is None):
        return Quantisation(method, *block or (0, 0))
    what = f"weights quantised by {method} are not decoded"
    expected = f"no {QUANTISED_BY}, or quant_method mxfp4, or fp8 with fmt e4m3 and two sizes as weight_block_size"
    remedy = "load the model dequantised, save it in bfloat16, and convert that"
    raise UnsupportedModel(what, CONFIG_FILE, expected, found=repr(said)[:200], remedy=remedy)


def with_scales(
    stored: Mapping[str, StoredTensor], quantisation: Quantisation | None, visible: FilesOfRanks
) -> dict[str, StoredTensor]:
    """The tensors of a model, those of codes with their scales, which are none of their own any more.

    `visible` are for each rank the files that it sees.

    Raises:
        Problems, or the one problem there is: codes without one scale for each block, or where no rank may read both.
    """
    found, used, problems = dict(stored), set[str](), list[ConversionError]()
    if quantisation is None:
        return found
    for name, tensor in stored.items():
        codes = _codes(tensor, quantisation)
        if codes is None:
            continue
        scales = name.removesuffix(BLOCKS) + _SCALES[quantisation.method]
        used.add(scales)
        try:
            found[name] = _scaled(codes, scales, stored.get(scales), quantisation, visible)
        except ConversionError as problem:
            problems.append(problem)
    raise_together(problems)
    return {name: tensor for name, tensor in found.items() if name not in used}


def _codes(tensor: StoredTensor, quantisation: Quantisation) -> StoredTensor | None:
    """The tensor as codes, one for each element; None of others."""
    shape = tensor.shape
    if len(shape) < 2 or tensor.strides != row_major(shape):
        return None
    if quantisation.method == "fp8":
        return tensor if tensor.dtype == "F8_E4M3" else None
    if not tensor.name.endswith(BLOCKS) or tensor.dtype != "U8" or len(shape) < 3 or shape[-1] != _BLOCK_BYTES:
        return None
    return replace(tensor, shape=(*shape[:-2], shape[-2] * _PACKED * _BLOCK_BYTES), strides=(*tensor.strides[:-2], 1))


def _scaled(
    codes: StoredTensor, name: str, scales: StoredTensor | None, quantisation: Quantisation, visible: FilesOfRanks
) -> StoredTensor:
    rows, columns = codes.shape[-2:]
    block = quantisation.block_rows or max(1, rows), quantisation.block_columns or max(1, columns)
    shape = (*codes.shape[:-2], -(-rows // block[0]), -(-columns // block[1]))
    shapes = [shape] if quantisation.block_rows or len(shape) > 2 else [shape, (), (1,)]
    is_fit = scales and scales.shape in shapes and scales.strides == row_major(scales.shape)
    if scales is None or not is_fit or scales.dtype not in _SCALE_DTYPES:
        raise MissingTensor(
            "a quantised weight without one scale for each block",
            (scales or codes).file,
            tensor=name,
            expected=f"shape {list(shape)} in {', '.join(_SCALE_DTYPES)}: {codes.name} is quantised by {quantisation}",
            found=f"shape {list(scales.shape)} in {scales.dtype}" if scales else "nothing in any weights file",
            remedy=f"without these scales the weights are wrong: download them and {CONFIG_FILE} again, from one place",
        )
    for files in dict.fromkeys(visible) if scales.file != codes.file else ():
        if codes.file in files and scales.file not in files:
            what = f"the scales of a quantised weight are not on the disk that has the weight, {codes.name}"
            expected = f"every rank that sees {codes.file} sees this file, too"
            found = f"rank {visible.index(files)} does not see it"
            remedy = f"copy {scales.file} to every node that has {codes.file}, or use a shared file system"
            raise MissingShard(what, scales.file, expected, found, remedy, tensor=name)
    place = scales.file, name, _SCALE_DTYPES[scales.dtype], scales.offset_bytes
    packed = _PACKED if quantisation.method == "mxfp4" else 1
    return replace(codes, scales=Scales(View(*place, 1, 1, shape[-1], 1), *block, packed))


def parameters_in(tensor: StoredTensor) -> int:
    """How many of a model's parameters a stored tensor holds; scales are none."""
    if tensor.name.endswith((*_SCALES.values(), ACTIVATION_SCALE)):
        return 0
    return tensor.elements * (_PACKED if tensor.name.endswith(BLOCKS) else 1)
