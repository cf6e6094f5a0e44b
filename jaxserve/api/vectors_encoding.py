"""How vectors leave: as numbers, in base64, or as bytes; vLLM's encoding_format, embed_dtype and endianness."""

from __future__ import annotations

import base64
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from jaxserve.api.fields import Fields
from jaxserve.pooling import Vector

FORMATS = ("float", "base64", "bytes", "bytes_only")
DTYPES: Mapping[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "fp8_e4m3": np.dtype(ml_dtypes.float8_e4m3fn), "fp8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}  # fmt: skip
ORDERS = ("native", "big", "little")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """What becomes of the numbers of a vector.

    Args:
      format: "float" shows them as JSON numbers, "base64" as text; "bytes" makes them the whole body, one vector behind the other, with
        what else there is to say in the header "metadata"; "bytes_only" says nothing else.
      dtype: the type they are rounded to, a key of DTYPES; numbers of JSON stay as they are.
      order: of the bytes of a number.
    """

    format: str = "float"
    dtype: str = "float32"
    order: str = "native"

    @property
    def is_binary(self) -> bool:
        """Whether the body is bytes instead of JSON."""
        return self.format in ("bytes", "bytes_only")

    def pack(self, vector: Vector) -> bytes:
        """The numbers as bytes."""
        numbers = vector.astype(DTYPES[self.dtype])
        width = numbers.dtype.itemsize
        if width > 1 and self.order not in ("native", sys.byteorder):
            # As integers: byte order is unknown to the types that numpy does not have itself.
            numbers = numbers.view(f"u{width}").byteswap()
        return numbers.tobytes()

    def shown(self, vector: Vector) -> Vector | str:
        """The vector as a member of a JSON answer."""
        return base64.b64encode(self.pack(vector)).decode() if self.format == "base64" else vector

    def body(self, vectors: Sequence[Vector], head: Mapping[str, Any], usage: Mapping[str, int]) -> tuple[bytes, bytes | None]:
        """The whole binary body, and the value of its header "metadata", if it has one.

        Args:
          head: members that begin a JSON answer.
        """
        pieces = [self.pack(vector) for vector in vectors]
        if self.format == "bytes_only":
            return b"".join(pieces), None
        items: list[dict[str, Any]] = []
        start = 0
        for index, (piece, vector) in enumerate(zip(pieces, vectors, strict=True)):
            end = start + len(piece)
            items.append(
                {
                    "index": index, "embed_dtype": self.dtype, "endianness": self.order, "start": start, "end": end,
                    "shape": list(vector.shape),
                }
            )  # fmt: skip
            start = end
        counts = {name: usage[name] for name in ("prompt_tokens", "total_tokens")}
        said = {**{name: head[name] for name in ("id", "created", "model")}, "data": items, "usage": counts}
        return b"".join(pieces), json.dumps(said).encode()  # all of it ASCII, as a header must be


def read_encoding(fields: Fields) -> Encoding:
    """The encoding that a body asks for. Raises: UserError naming the field at fault."""
    return Encoding(
        format=fields.text("encoding_format", "float", choices=FORMATS),
        dtype=fields.text("embed_dtype", "float32", choices=tuple(DTYPES)),
        order=fields.text("endianness", "native", choices=ORDERS),
    )
