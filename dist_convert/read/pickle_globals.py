"""What a checkpoint's pickle may name: docs/formats.md, "Pickled classes". Nothing of it is imported or called."""

#: torch's storage classes and scalar types, by safetensors name.
STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8",
    "ByteStorage": "U8", "BoolStorage": "BOOL",
    "Float8_e4m3fnStorage": "F8_E4M3", "Float8_e5m2Storage": "F8_E5M2",
    "UInt16Storage": "U16", "UInt32Storage": "U32", "UInt64Storage": "U64", "UntypedStorage": "U8",
}  # fmt: skip
DTYPES = {
    "float64": "F64", "double": "F64", "float32": "F32", "float": "F32", "float16": "F16", "half": "F16",
    "bfloat16": "BF16", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8",
    "bool": "BOOL", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "uint16": "U16", "uint32": "U32", "uint64": "U64",
}  # fmt: skip

#: Everything below these packages may be named; it is neither imported nor called.
INERT_PACKAGES = ("megatron", "transformer_engine", "habana_frameworks", "intel_transformer_engine", "apex")
_BUILTINS = {
    "bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "getattr", "int", "list", "long", "object",
    "range", "set", "slice", "str", "tuple", "unicode", "xrange",
}  # fmt: skip
INERT_GLOBALS = {
    "_codecs": {"encode"},
    "_io": {"BytesIO"},
    "argparse": {"Namespace"},
    "__builtin__": _BUILTINS,
    "builtins": _BUILTINS,
    "collections": {"Counter", "defaultdict", "deque"},
    "copyreg": {"_reconstructor"},
    "copy_reg": {"_reconstructor"},
    "datetime": {"datetime", "timedelta", "timezone"},
    "fp16.loss_scaler": {"DynamicLossScaler", "LossScaler"},
    "io": {"BytesIO"},
    "numpy": {"dtype", "ndarray"},
    "numpy._core.multiarray": {"_reconstruct", "scalar"},
    "numpy._core.numeric": {"_frombuffer"},
    "numpy.core.multiarray": {"_reconstruct", "scalar"},
    "numpy.core.numeric": {"_frombuffer"},
    "numpy.dtypes": {"Float32DType", "Float64DType", "Int64DType", "UInt32DType", "UInt64DType"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath", "WindowsPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath"},
    "signal": {"Signals"},
    "torch": {"Generator", "Size", "Tensor", "device"},
    "torch._C": {"Generator"},
    "torch._utils": {"_rebuild_device_tensor_from_numpy", "_rebuild_wrapper_subclass"},
    "torch.nn.parameter": {"Parameter"},
    "torch.optim.adam": {"Adam"},
    "torch.optim.adamw": {"AdamW"},
    "torch.serialization": {"_get_layout"},
    "types": {"SimpleNamespace"},
}  # fmt: skip
