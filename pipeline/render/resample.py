"""Resize crops with integer arithmetic, to the bytes that Pillow makes.

Rows are convolved first, then columns. Each pass multiplies 8-bit pixels by weights of
22 fractional bits, adds them up, rounds, and clips to 8 bits (Pillow's
libImaging/Resample.c). Weights are computed in float64 and rounded, and sums are int32,
so the result is the same on every CPU, whatever vector instructions it has.

``image.resize((size, height), filter).resize((size, size), filter)`` makes these bytes
in every version of Pillow. ``image.resize((size, size), filter)`` makes them up to
Pillow 12. Pillow 13 convolves columns first if an image shrinks by more than twice as
many rows as columns, which moves some pixels by one level of 255, with bicubic weights
at hard edges by some 25.

numba compiles these functions once per machine and keeps the result beside this file,
or in the user's cache folder. They run without the interpreter's lock.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

BITS = 22  # fractional bits of a weight; Pillow's PRECISION_BITS
HALF = 1 << (BITS - 1)  # one half, which makes the shift by BITS round
# Rows that the horizontal pass convolves at once. A row's pixel takes four lanes of a
# vector (three colours and a spare), so eight rows fill two vectors of AVX-512.
ROWS = 8
# The columns of a table of squares: a box of an image (its top, left, height and
# width), height and width that the box is resized to, top and left of the square in the
# result, all in pixels; and 1 if the square is mirrored left-right, otherwise 0.
SQUARE = ("top", "left", "height", "width", "tall", "wide", "first_row", "first_column", "flip")
SPARE = 4  # bytes behind a row that may be read, or written with nothing meant


def _compiled(function: Callable) -> Any:
    """Compile a function with numba. The result is kept on disk where a folder for it
    can be written, otherwise each process compiles again (some three seconds)."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # numba finds no folder that it may write
        return numba.njit(nogil=True)(function)


@intrinsic
def _bytes_at(context: Any, address: Any) -> Any:
    """Make a pointer to bytes of an address, for ``numba.carray``."""
    signature = numba.types.CPointer(numba.types.uint8)(numba.types.intp)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return signature, generate


@intrinsic
def _convolve(
    context: Any, source: Any, at: Any, weights: Any, taps: Any, made: Any, to: Any
) -> Any:
    """Convolve ``ROWS`` rows at one output column.

    source: uint8 [rows, bytes]. at: place in ``source``, in bytes, of the first RGB
    pixel under the filter, in the first row. weights: int32 [at least taps]. made:
    uint8 [rows, bytes]. to: place in ``made``, in bytes, of the output pixel in the
    first row. Four bytes are read and written for each pixel of three.

    LLVM doesn't find these vectors in a loop over three colours by itself: the loop
    takes three times as long.
    """
    signature = numba.types.void(source, at, weights, taps, made, to)

    def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        int32, int64, lanes = ir.IntType(32), ir.IntType(64), 4 * ROWS
        arrays = {
            place: make_array(signature.args[place])(context, b, arguments[place])
            for place in (0, 2, 4)
        }

        def start(place: int, offset: Any) -> Any:
            """Return the address at an offset in bytes in an array."""
            return b.add(b.ptrtoint(arrays[place].data, int64), offset)

        def pitch(place: int) -> Any:
            """Return the bytes from a row of an array to the next."""
            return b.extract_value(arrays[place].strides, 0)

        taps = arguments[3]
        sums, colours = ir.VectorType(int32, lanes), ir.VectorType(ir.IntType(8), lanes)
        pixels = ir.VectorType(int32, ROWS)

        def word(address: Any) -> Any:
            return b.inttoptr(address, int32.as_pointer())

        def same(value: int) -> Any:
            return ir.Constant(sums, [value] * lanes)

        first, first_made = start(0, arguments[1]), start(4, arguments[5])
        rows = [b.add(first, b.mul(pitch(0), int64(row))) for row in range(ROWS)]
        filters = start(2, int64(0))
        before, loop, after = b.block, b.append_basic_block(), b.append_basic_block()
        b.branch(loop)
        b.position_at_end(loop)
        tap, total = b.phi(int64), b.phi(sums)
        read = ir.Constant(pixels, ir.Undefined)
        for row, address in enumerate(rows):
            found = b.load(word(b.add(address, b.mul(tap, int64(3)))), align=1)
            read = b.insert_element(read, found, int32(row))
        weight = b.load(word(b.add(filters, b.mul(tap, int64(4)))), align=4)
        alike = b.insert_element(ir.Constant(sums, ir.Undefined), weight, int32(0))
        alike = b.shuffle_vector(alike, ir.Constant(sums, ir.Undefined), same(0))
        added = b.add(total, b.mul(b.zext(b.bitcast(read, colours), sums), alike))
        following = b.add(tap, int64(1))
        for phi, first, then in ((tap, int64(0), following), (total, same(HALF), added)):
            phi.add_incoming(first, before)
            phi.add_incoming(then, loop)
        b.cbranch(b.icmp_signed("<", following, taps), loop, after)
        b.position_at_end(after)
        level = b.ashr(added, same(BITS))
        level = b.select(b.icmp_signed("<", level, same(0)), same(0), level)
        level = b.select(b.icmp_signed(">", level, same(255)), same(255), level)
        written = b.bitcast(b.trunc(level, colours), pixels)
        for row in range(ROWS):
            place = b.add(first_made, b.mul(pitch(4), int64(row)))
            b.store(b.extract_element(written, int32(row)), word(place), align=1)
        return context.get_dummy_value()

    return signature, generate


@_compiled
def _taps(length: int, out: int, cubic: bool) -> int:
    """Return how many source pixels at most make one output pixel."""
    return math.ceil((2.0 if cubic else 1.0) * max(1.0, length / out)) * 2 + 1


@_compiled
def _weigh(
    length: int,
    out: int,
    first: int,
    cubic: bool,
    mirrored: bool,
    bounds: np.ndarray,
    weights: np.ndarray,
) -> None:
    """Compute the filter of one direction (Pillow's precompute_coeffs).

    length: source pixels. out: pixels that ``length`` is resized to, of which those
    from ``first`` on are made. mirrored: the last of them comes first. bounds: int64
    [n, 2], receives the first source pixel and the number of source pixels. weights:
    int32 [n, taps], receives the weights.
    """
    scale = length / out
    filter_scale = max(1.0, scale)
    support = (2.0 if cubic else 1.0) * filter_scale
    inverse = 1.0 / filter_scale
    n = len(bounds)
    values = np.empty(weights.shape[1])
    for j in range(n):
        centre = (first + j + 0.5) * scale
        low = max(0, int(centre - support + 0.5))
        taps = min(length, int(centre + support + 0.5)) - low
        total = 0.0
        for i in range(taps):
            x = abs((i + low - centre + 0.5) * inverse)
            value = 0.0
            if not cubic:
                if x < 1.0:
                    value = 1.0 - x
            elif x < 1.0:
                value = ((-0.5 + 2.0) * x - (-0.5 + 3.0)) * x * x + 1
            elif x < 2.0:
                value = (((x - 5) * x + 8) * x - 4) * -0.5
            values[i] = value
            total += value
        place = n - 1 - j if mirrored else j
        bounds[place, 0], bounds[place, 1] = low, taps
        for i in range(taps):
            share = values[i] / total if total != 0.0 else values[i]
            weights[place, i] = int((-0.5 if share < 0 else 0.5) + share * (1 << BITS))


@_compiled
def _horizontal(
    source: np.ndarray, left: int, bounds: np.ndarray, weights: np.ndarray, made: np.ndarray
) -> None:
    """Convolve along rows.

    source: uint8 [rows, bytes], pixels of three bytes. left: the pixel that ``bounds``
    count from. made: uint8 [at least rows + ROWS, 3 · n + SPARE].
    """
    rows, width = source.shape
    for row in range(0, rows, ROWS):
        read, first = source, row
        if row + ROWS >= rows:
            # Nothing may be read behind the last row, so the last rows are copied.
            read, first = np.zeros((ROWS, width + SPARE), np.uint8), 0
            for y in range(rows - row):
                for x in range(width):
                    read[y, x] = source[row + y, x]
        for x in range(len(bounds)):
            _convolve(
                read,
                first * read.strides[0] + 3 * (left + bounds[x, 0]),
                weights[x],
                bounds[x, 1],
                made,
                row * made.strides[0] + 3 * x,
            )


@_compiled
def _vertical(
    source: np.ndarray, first: int, bounds: np.ndarray, weights: np.ndarray, made: np.ndarray
) -> None:
    """Convolve along columns.

    source: uint8 [rows, at least n]. first: the number that ``bounds`` give the first
    row. made: uint8 [rows, n].
    """
    n = made.shape[1]
    total = np.empty(n, np.int32)
    for y in range(len(bounds)):
        low = bounds[y, 0] - first
        line, weight = source[low], weights[y, 0]
        for x in range(n):
            total[x] = HALF + np.int32(line[x]) * weight
        for i in range(1, bounds[y, 1]):
            line, weight = source[low + i], weights[y, i]
            for x in range(n):
                total[x] += np.int32(line[x]) * weight
        line = made[y]
        for x in range(n):
            line[x] = np.uint8(min(max(total[x] >> BITS, 0), 255))


@_compiled
def _resize(image: np.ndarray, square: np.ndarray, cubic: bool, made: np.ndarray) -> None:
    """Resize a box of an image, and keep a square of the result.

    image: uint8 [height, 3 · width]. square: a row of ``SQUARE``. cubic: bicubic,
    otherwise bilinear. made: uint8 [size, size, 3], receives the square.
    """
    size = len(made)
    top, left, height, width = square[0], square[1], square[2], square[3]
    tall, wide = square[4], square[5]
    across, down = np.empty((size, 2), np.int64), np.empty((size, 2), np.int64)
    weights_across = np.empty((size, _taps(width, wide, cubic)), np.int32)
    weights_down = np.empty((size, _taps(height, tall, cubic)), np.int32)
    _weigh(width, wide, square[7], cubic, square[8] != 0, across, weights_across)
    _weigh(height, tall, square[6], cubic, False, down, weights_down)
    first, last = down[0, 0], down[-1, 0] + down[-1, 1]
    rows = np.empty((last - first + ROWS, 3 * size + SPARE), np.uint8)
    _horizontal(image[top + first : top + last], left, across, weights_across, rows)
    _vertical(rows, first, down, weights_down, made.reshape(size, 3 * size))


@_compiled
def resize_all(
    images: np.ndarray,
    squares: np.ndarray,
    cubic: bool,
    places: tuple[int, int, int],
    made: np.ndarray,
) -> None:
    """Resize boxes of decoded images, and keep a square of each result.

    images: int64 [n, 3]: the address of an image's pixels, uint8 [height, width, 3],
    height, and width. squares: int64 [squares, n, 9], rows of ``SQUARE``; boxes lie
    inside the images, which nothing checks here. cubic: bicubic, otherwise bilinear.
    places: the first image to resize, the image behind the last one, and the place of
    image 0 in ``made``, uint8 [squares, images, size, size, 3].
    """
    start, end, at = places
    for i in range(start, end):
        height, width = images[i, 1], images[i, 2]
        image = numba.carray(_bytes_at(images[i, 0]), (height, 3 * width))
        for square in range(len(squares)):
            _resize(image, squares[square, i], cubic, made[square, at + i])
