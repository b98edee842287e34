"""The coded video as bytes: header, weights and embeddings in a container, and what each of them costs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from .. import huffman
from ..errors import InvalidBitstream
from .container import Container, Section, write_container
from .entropy import entropy_coder
from .header import Color, Header, Source
from .quantization import QuantizedTensor, dequantize
from .sections import TensorSection, encode_tensors

__all__ = ["Accounting", "Bitstream", "Color", "Header", "Source", "write_bitstream"]

_EMBEDDINGS = "embeddings"
_PAPER_BITS_PER_NUMBER = 16


@dataclass(frozen=True)
class Accounting:
    """What a coded video costs: as the paper counts, and what the file really takes.

    Attributes:
        file_bytes: size of the file. Nothing is left out.
        section_bytes: bytes of each section, and of magic number and directory under ``"directory"``; they add up to
            ``file_bytes``.
        side_information_bytes: bytes of the steps and offsets of weights and embeddings, within their sections.
        symbol_bytes: bytes of the entropy-coded symbols of weights and embeddings, within their sections.
        entropy: name of the entropy coder.
        parameters: number of weights.
        embedding_values: number of embedding values of all frames.
        pairs: number of (step, offset) pairs.
        paper_symbol_bits: bits of all symbols in one Huffman code, :func:`hflfnerv.huffman.payload_bits`; its table is
            not counted.
        paper_bits: the same and 16 bits for each minimum and each scale: the rate that the NeRV papers report.
        pixels: ``T * H * W``.
    """

    file_bytes: int
    section_bytes: Mapping[str, int]
    side_information_bytes: int
    symbol_bytes: int
    entropy: str
    parameters: int
    embedding_values: int
    pairs: int
    paper_symbol_bits: int
    paper_bits: int
    pixels: int

    @property
    def bits_per_pixel(self) -> float:
        """``8 * file_bytes / pixels``."""
        return 8 * self.file_bytes / self.pixels

    @property
    def paper_bits_per_pixel(self) -> float:
        return self.paper_bits / self.pixels


def write_bitstream(
    header: Header,
    weights: Mapping[str, QuantizedTensor],
    embeddings: QuantizedTensor | None,
    *,
    entropy: str = "huffman",
) -> bytes:
    """Return a complete ``.hflf`` file.

    Args:
        header: what a decoder needs besides.
        weights: the network's quantised tensors by name; their order is kept.
        embeddings: quantised ``[T, C, h, w]``, or None for a network without embeddings.
        entropy: ``"huffman"`` or ``"range"``.

    Raises:
        ValueError: the embeddings are not of the header's number of frames, or a limit of the format is exceeded.
        BackendUnavailable: the entropy coder needs a package that is not installed.
    """
    coder = entropy_coder(entropy)
    sections = [Section("WGTS", encode_tensors(weights, coder))]
    if embeddings is not None:
        if len(embeddings.shape) != 4 or embeddings.shape[0] != header.frames:
            raise ValueError(f"embeddings must be [{header.frames}, C, h, w], got {list(embeddings.shape)}")
        sections.append(Section("EMBD", encode_tensors({_EMBEDDINGS: embeddings}, coder, rows=True)))
    return write_container(header, sections)


class Bitstream:
    """A ``.hflf`` file opened for reading. Each part is read, and checked, when it is asked for.

    Attributes:
        header: the header.

    Example:
        >>> with Bitstream.open("clip.hflf") as stream:  # doctest: +SKIP
        ...     stream.header.frames, stream.accounting().bits_per_pixel
        (132, 0.1071)
    """

    def __init__(self, container: Container) -> None:
        """Use :meth:`open`."""
        self._container = container
        self.header = container.header

    @classmethod
    def open(cls, source: str | os.PathLike[str] | bytes | bytearray | memoryview) -> Bitstream:
        """Open a file by its path, or its bytes.

        Raises:
            OSError: the path cannot be opened.
            TypeError: it is neither.
            BitstreamError: the data is no such file, or damaged; the subclass names the cause.
        """
        if isinstance(source, (bytes, bytearray, memoryview)):
            return cls(Container.parse(source))
        if not isinstance(source, (str, os.PathLike)):  # of numbers open() makes files
            raise TypeError(f"source must be a path, or the bytes of a file, got {type(source).__name__}")
        container = Container.open(source)
        try:
            return cls(container)
        except BaseException:
            container.close()
            raise

    def close(self) -> None:
        """Release the file. What was read stays valid."""
        self._container.close()

    def __enter__(self) -> Bitstream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def size(self) -> int:
        """Size of the file in bytes."""
        return self._container.size

    @property
    def section_bytes(self) -> dict[str, int]:
        """Bytes of each section, and of magic number and directory under ``"directory"``; together, the file."""
        sizes = {tag: entry.length for tag, entry in self._container.entries.items()}
        return {"directory": self.size - sum(sizes.values()), **sizes}

    @cached_property
    def _weights(self) -> TensorSection:
        return TensorSection(self._container.section("WGTS"), "section WGTS")

    @cached_property
    def _embeddings(self) -> TensorSection | None:
        if "EMBD" not in self._container:
            return None
        section = TensorSection(self._container.section("EMBD"), "section EMBD", rows=True)
        shapes = [record.shape for record in section.records]
        if len(shapes) != 1 or len(shapes[0]) != 4 or shapes[0][0] != self.header.frames:
            raise InvalidBitstream(f"section EMBD: must be one tensor [{self.header.frames}, C, h, w], got {shapes}")
        return section

    @property
    def entropy(self) -> str:
        """Name of the entropy coder of the weights."""
        return self._weights.coder.name

    @property
    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the weights by name, in file order."""
        return {record.name: record.shape for record in self._weights.records}

    @property
    def key_interval(self) -> int:
        """A frame's embedding is a difference from the frame before, but for every so many; 0 if none are."""
        return 0 if self._embeddings is None else self._embeddings.key_interval

    @property
    def embedding_shape(self) -> tuple[int, int, int] | None:
        """Shape ``(C, h, w)`` of one frame's embedding, None if there are none."""
        if self._embeddings is None:
            return None
        _, channels, height, width = self._embeddings.records[0].shape
        return channels, height, width

    def read_weights(self, shapes: Mapping[str, tuple[int, ...]] | None = None) -> dict[str, QuantizedTensor]:
        """Decode the weights.

        Args:
            shapes: the shape that each tensor must have; None to take what the file has.

        Returns:
            The tensors by name, in file order.

        Raises:
            InvalidBitstream: names or shapes are not those asked for; nothing is decoded then.
            BitstreamError: the weights are damaged or invalid.
        """
        if shapes is not None:
            found, wanted = self.weight_shapes, {name: tuple(shape) for name, shape in shapes.items()}
            differing = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
            if differing:
                raise InvalidBitstream(
                    f"the weights must fit the network, but {len(differing)} tensors do not: {differing[0]} has "
                    f"shape {found.get(differing[0], 'none')} in the file and {wanted.get(differing[0], 'none')} there"
                )
        return self._weights.read()

    def read_quantized_embeddings(self) -> QuantizedTensor:
        """Decode the embeddings of all frames to symbols.

        Raises:
            InvalidBitstream: the file has none.
            BitstreamError: they are damaged or invalid.
        """
        section = self._require_embeddings()
        return section.read_rows(range(self.header.frames))

    def read_embeddings(self, indices: Sequence[int] | NDArray[np.integer] | None = None) -> NDArray[np.float32]:
        """Decode the embeddings of some frames, and little else.

        Args:
            indices: frames in ``0 .. T - 1``, in any order; None for all.

        Returns:
            float32 ``[n, C, h, w]``. A frame's values do not depend on the others asked for.

        Raises:
            IndexError: an index is out of range.
            InvalidBitstream: the file has no embeddings.
            BitstreamError: they are damaged or invalid.
        """
        section = self._require_embeddings()
        wanted = np.arange(self.header.frames) if indices is None else np.asarray(indices, dtype=np.int64)
        if wanted.ndim != 1:
            raise ValueError(f"indices must be one-dimensional, got {wanted.ndim} axes")
        if wanted.size == 0:
            return np.empty((0, *section.records[0].shape[1:]), dtype=np.float32)
        if wanted.min() < 0 or wanted.max() >= self.header.frames:
            raise IndexError(f"indices must be in 0..{self.header.frames - 1}, got {wanted.min()}..{wanted.max()}")
        return dequantize(section.read_rows(wanted))

    def _require_embeddings(self) -> TensorSection:
        if self._embeddings is None:
            raise InvalidBitstream("the file has no embeddings")
        return self._embeddings

    def accounting(self) -> Accounting:
        """Count what the coded video costs. Decodes everything.

        Raises:
            BitstreamError: the weights or the embeddings are damaged or invalid.
        """
        sections = [self._weights]
        tensors = list(self._weights.read().values())
        parameters = sum(tensor.symbols.size for tensor in tensors)
        if self._embeddings is not None:
            sections.append(self._embeddings)
            tensors.append(self.read_quantized_embeddings())
        symbols = np.concatenate([tensor.symbols.ravel() for tensor in tensors])
        pairs = sum(tensor.pairs for tensor in tensors)
        symbol_bits = huffman.payload_bits(symbols)
        return Accounting(
            file_bytes=self.size,
            section_bytes=self.section_bytes,
            side_information_bytes=sum(section.side_bytes for section in sections),
            symbol_bytes=sum(section.symbol_bytes for section in sections),
            entropy=self.entropy,
            parameters=parameters,
            embedding_values=symbols.size - parameters,
            pairs=pairs,
            paper_symbol_bits=symbol_bits,
            paper_bits=symbol_bits + 2 * _PAPER_BITS_PER_NUMBER * pairs,
            pixels=self.header.frames * self.header.height * self.header.width,
        )
