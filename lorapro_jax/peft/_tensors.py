"""The arrays of a safetensors file in NumPy, those of 8 bits as float32."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

# Of PyTorch's dtypes of 8 bits; safetensors names them, but cannot make NumPy's.
_NARROW = {"F8_E4M3": jnp.float8_e4m3fn, "F8_E5M2": jnp.float8_e5m2}
_PLAIN = {
    "F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8",
    "BOOL",
}  # fmt: skip


def read_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """All arrays of a file, and its metadata.

    Raises:
      ValueError: It is damaged, or has a dtype that is not known here.
      ImportError: safetensors is not installed.
    """
    safetensors = safetensors_package()
    try:
        with safetensors.safe_open(path, framework="np") as file:
            kinds = {x: str(file.get_slice(x).get_dtype()) for x in file.keys()}  # noqa: SIM118
            tensors = {x: file.get_tensor(x) for x, y in kinds.items() if y in _PLAIN}
            metadata = dict(file.metadata() or {})
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"`{path}` is damaged or was not written to its end: {error}."
        ) from None
    unknown = {x: y for x, y in kinds.items() if y not in _PLAIN | _NARROW.keys()}
    for name, kind in unknown.items():
        raise ValueError(f"`{name}` of `{path}` has the unknown dtype {kind}.")
    if len(tensors) < len(kinds):
        for name, raw in safetensors.deserialize(path.read_bytes()):
            if raw["dtype"] in _NARROW:
                dtype = np.dtype(_NARROW[raw["dtype"]])
                x = np.frombuffer(raw["data"], dtype).reshape(raw["shape"])
                tensors[name] = x.astype(np.float32)
    return tensors, metadata


def safetensors_package() -> Any:
    """The optional package, imported where it is first needed."""
    try:
        import safetensors.numpy
    except ImportError:
        raise ImportError(
            "PEFT files need safetensors: `pip install 'lorapro_jax[peft]'`."
        ) from None
    return safetensors
