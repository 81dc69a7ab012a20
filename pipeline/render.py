"""The one renderer: image bytes + crops → uint8 pixels. Teachers, student and evaluation all see what this makes. Only this module knows DALI.

A crop is cut out of the decoded image and then resized (``fn.resize`` with a region gives other pixels). Where one crop of an image is
wanted, only its region is decoded; on the CPU that equals the whole decode bit for bit. Pixels don't depend on the batch or on threads.
"""

from __future__ import annotations

import hashlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from nvidia import dali
from nvidia.dali import fn, types

from cache.schema import USABLE, Images, MealError

STEPS = "slice, resize with anti-aliasing, flip"  # what a stored label's pixels went through, in order
FINGERPRINT_CROPS = 64
dali_version: str = dali.__version__
# A black pixel (PPM): what is rendered in the place of an unusable image, so that the others keep their place in the batch.
BLANK = b"P6 1 1 255\n\0\0\0"
_INTERPOLATION = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}


class RenderError(MealError):
    """An image that decoded when the manifest was made and doesn't now. ``place``: which of the batch, if that could be found out."""

    def __init__(self, message: str, place: int | None = None) -> None:
        super().__init__(message)
        self.place = place


def threads_for(threads: int | None) -> int:
    """Decoder threads: as told, or as many as this process may use, at most 16; torchrun's processes of a machine share its cores."""
    return threads or max(1, min(16, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


class _Graph:
    """A DALI pipeline fed with encoded images, rebuilt when an undecodable one has killed it."""

    def __init__(self, batch_size: int, threads: int, backend: str) -> None:
        self.batch_size, self.threads, self.gpu = batch_size, threads, backend == "gpu"
        if self.gpu and not torch.cuda.is_available():
            raise RenderError(
                "pixels rendered on a GPU (render.backend: gpu) need one, and torch finds none here; use a machine that has one"
            )
        self.device = torch.cuda.current_device() if self.gpu else None  # of this thread: the thread that renders has another one
        self.pipe: dali.Pipeline | None = None

    def define(self, encoded: dali.data_node.DataNode) -> list[dali.data_node.DataNode]:
        raise NotImplementedError

    def run(self, blobs: Sequence[bytes], **arguments: np.ndarray) -> Sequence:
        """Feed encoded images and named arrays [len(blobs), …], and return DALI's outputs."""
        if self.pipe is None:
            self.pipe = dali.Pipeline(
                batch_size=self.batch_size,
                num_threads=self.threads,
                device_id=self.device,
                prefetch_queue_depth=1,
                exec_async=False,
                exec_pipelined=False,
            )
            with self.pipe:
                self.pipe.set_outputs(*self.define(fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)))
            self.pipe.build()
        self.pipe.feed_input("encoded", [np.frombuffer(blob, np.uint8) for blob in blobs])
        for name, array in arguments.items():
            self.pipe.feed_input(name, np.ascontiguousarray(array))
        try:
            return self.pipe.run()
        except RuntimeError as error:
            self.pipe = None  # DALI's pipelines don't outlive an error
            place = next((i for i, blob in enumerate(blobs) if len(blobs) > 1 and WholeDecode("ignore")(blob) is None), None)
            raise RenderError(f"DALI could not render it ({_reason(error)})", 0 if len(blobs) == 1 else place) from None

    def decode(self, encoded: dali.data_node.DataNode, exif: str) -> dali.data_node.DataNode:
        return fn.decoders.image(
            encoded,
            device="mixed" if self.gpu else "cpu",
            output_type=types.RGB,
            adjust_orientation=exif == "apply",
            jpeg_fancy_upsampling=True,
        )


class Crops(_Graph):
    """Stored crops of images, at one or several output sizes, from one decode per image."""

    def __init__(
        self,
        sizes: Sequence[int],
        views: int,
        batch_size: int,
        *,
        interpolation: str,
        exif: str,
        backend: str = "cpu",
        threads: int | None = None,
    ) -> None:
        super().__init__(batch_size, threads_for(threads), backend)
        self.sizes, self.views, self.interpolation, self.exif = sorted(set(sizes)), views, interpolation, exif

    def define(self, encoded: dali.data_node.DataNode) -> list[dali.data_node.DataNode]:
        def argument(name: str, dtype: types.DALIDataType, ndim: int) -> dali.data_node.DataNode:
            return fn.external_source(name=name, dtype=dtype, ndim=ndim)

        outputs = []
        image = None if self.views == 1 and not self.gpu else self.decode(encoded, self.exif)
        for view in range(self.views):
            start, shape = argument(f"start{view}", types.INT32, 1), argument(f"shape{view}", types.INT32, 1)
            flip = argument(f"flip{view}", types.INT32, 0)
            if image is None:
                cut = fn.decoders.image_slice(
                    encoded,
                    start=start,
                    shape=shape,
                    axes=[0, 1],
                    output_type=types.RGB,
                    adjust_orientation=self.exif == "apply",
                    jpeg_fancy_upsampling=True,
                )
            else:
                cut = fn.slice(image, start=start, shape=shape, axes=[0, 1])
            for size in self.sizes:
                resized = fn.resize(cut, size=[size, size], interp_type=_INTERPOLATION[self.interpolation], antialias=True)
                outputs.append(fn.flip(resized, horizontal=flip))
        return outputs

    def __call__(self, blobs: Sequence[bytes], boxes: np.ndarray, flips: np.ndarray) -> list[dict[int, torch.Tensor]]:
        """blobs: n encoded images; boxes int [views, n, 4] top, left, height, width in pixels; flips bool [views, n].

        Returns per view a dict: output size → uint8 [n, size, size, 3], on the renderer's device.
        """
        arguments = {}
        for view in range(self.views):
            box = boxes[view].astype(np.int32)
            arguments |= {f"start{view}": box[:, :2], f"shape{view}": box[:, 2:], f"flip{view}": flips[view].astype(np.int32)}
        outputs = iter(self.run(blobs, **arguments))
        return [{size: _tensor(next(outputs)) for size in self.sizes} for _ in range(self.views)]


class Centre(_Graph):
    """Evaluation's view: the shorter side resized to size · 256 / 224 (rounded down, as timm does), then the central square (He et al., arXiv 1512.03385, as in the paper)."""

    def __init__(
        self, looks: Sequence[tuple[int, str]], batch_size: int, *, exif: str, backend: str = "cpu", threads: int | None = None
    ) -> None:
        super().__init__(batch_size, threads_for(threads), backend)
        self.looks, self.exif = sorted(set(looks)), exif

    def define(self, encoded: dali.data_node.DataNode) -> list[dali.data_node.DataNode]:
        image = self.decode(encoded, self.exif)
        outputs = []
        for i, (size, interpolation) in enumerate(self.looks):
            whole = fn.external_source(name=f"whole{i}", dtype=types.FLOAT, ndim=1)
            start = fn.external_source(name=f"start{i}", dtype=types.INT32, ndim=1)
            resized = fn.resize(image, size=whole, interp_type=_INTERPOLATION[interpolation], antialias=True)
            outputs.append(fn.slice(resized, start=start, shape=[size, size], axes=[0, 1]))
        return outputs

    def __call__(self, blobs: Sequence[bytes], height: np.ndarray, width: np.ndarray) -> dict[tuple[int, str], torch.Tensor]:
        """n encoded images and their decoded heights and widths [n] → (size, interpolation) → uint8 [n, size, size, 3]."""
        arguments = {}
        for i, (size, _) in enumerate(self.looks):
            short = size * 256 // 224
            shorter = np.minimum(height, width)
            whole = np.stack([short * height.astype(np.int64) // shorter, short * width.astype(np.int64) // shorter], axis=1)
            arguments[f"whole{i}"] = whole.astype(np.float32)
            arguments[f"start{i}"] = np.rint((whole - size) / 2).astype(np.int32)
        outputs = self.run(blobs, **arguments)
        return {look: _tensor(out) for look, out in zip(self.looks, outputs, strict=True)}


class _OneImage(_Graph):
    """Looks at one image. One a pipeline, and a pipeline a thread: destroying a pipeline in which one image of several has failed crashes DALI 2.4
    (a segmentation fault within a few dozen failures, measured), while its other images are still being decoded."""

    def __init__(self, exif: str) -> None:
        super().__init__(1, 1, "cpu")
        self.exif = exif


class Header(_OneImage):
    """What the decoder will take an image's size to be, from its header alone."""

    def define(self, encoded: dali.data_node.DataNode) -> list[dali.data_node.DataNode]:
        return [fn.peek_image_shape(encoded, adjust_orientation=self.exif == "apply")]

    def __call__(self, blob: bytes) -> tuple[int, int] | None:
        """(height, width) in pixels; None if DALI knows no such image."""
        try:
            (shape,) = self.run([blob])
        except RenderError:
            return None
        return tuple(int(length) for length in np.array(shape.at(0))[:2])


class WholeDecode(_OneImage):
    """Decodes an image whole, for what that tells: height and width, or that the bytes are no image."""

    def define(self, encoded: dali.data_node.DataNode) -> list[dali.data_node.DataNode]:
        return [self.decode(encoded, self.exif)]

    def __call__(self, blob: bytes) -> tuple[int, int] | None:
        """(height, width) of the decoded image; None if it can't be decoded whole."""
        try:
            (image,) = self.run([blob])
        except RenderError:
            return None
        return tuple(image.shape()[0][:2])


def fingerprint(blobs: Sequence[bytes], rows: np.ndarray, boxes: np.ndarray, flips: np.ndarray, sizes: Sequence[int], **how) -> dict:
    """Digests of rendered crops, by which a later run knows whether it renders the same pixels.

    rows [n], boxes [n, 4], flips [n], blobs: the first usable images and their crops of view 0. Returns what the store keeps.
    """
    rendered = Crops(sizes, 1, max(1, len(rows)), **how)(blobs, boxes[None], flips[None])[0] if len(rows) else {}
    return {
        "rows": rows.tolist(),
        "boxes": boxes.tolist(),
        "flips": flips.tolist(),
        "digests": {str(size): hashlib.sha256(pixels.cpu().numpy().tobytes()).hexdigest() for size, pixels in rendered.items()},
    }


def fingerprint_rows(images: Images) -> np.ndarray:
    return np.flatnonzero(images.status == USABLE)[:FINGERPRINT_CROPS]


def _tensor(output: object) -> torch.Tensor:
    """A copy of a dense DALI output, which DALI reuses for the next batch."""
    if isinstance(output, dali.backend.TensorListCPU):
        return torch.from_numpy(np.array(output.as_array()))
    copy = torch.from_dlpack(output.as_tensor()).clone()
    torch.cuda.current_stream(copy.device).synchronize()  # DALI may write to its buffer again as soon as this returns
    return copy


def _reason(error: RuntimeError) -> str:
    lines = [line.strip() for line in str(error).split("encountered:")[-1].splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__


@contextmanager
def quiet_decoders() -> Iterator[None]:
    """Silence what the decoders' C libraries print of broken images (no setting does): the manifest says it better.

    They write to file descriptor 2; Python's own stderr moves to a copy of it meanwhile, and goes on being seen.
    """
    original, copy, nowhere = sys.stderr, os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        ours = original.fileno() == 2
    except (io.UnsupportedOperation, AttributeError, ValueError):
        ours = False  # somebody captures Python's stderr already
    if ours:
        sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, encoding=original.encoding, errors=original.errors)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(copy, 2)
        os.close(copy)
        os.close(nowhere)
        if ours:
            sys.stderr.close()
            sys.stderr = original
