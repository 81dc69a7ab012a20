"""Run DALI, which decodes images and, on a GPU, resizes crops too. Only this module and
dali_resize.py use DALI.

On the CPU an image's decoded pixels depend neither on the batch nor on the number of
threads, and a region's pixels equal the whole decode's bit for bit.

A GPU has two JPEG decoders, whose pixels differ: one in CUDA, one in hardware. By
default DALI gives the largest 65 % of a batch to the hardware, so that an image's
pixels would depend on the other images in its batch. Here the backend and the file
alone decide:

- ``gpu``: CUDA decodes everything.
- ``gpu-hardware``: the hardware decodes every baseline JPEG, and CUDA everything else,
  each in a DALI pipeline of its own. This backend is an experiment until it has been
  proved on a card: if the hardware fails on a file, CUDA decodes the file's whole batch
  without a warning (nvImageCodec 0.8, extensions/nvjpeg/hw_decoder.cpp).
"""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from nvidia import dali
from nvidia.dali import fn, types

from pipeline.render.errors import NoMemory, RenderError
from pipeline.render.hardware_jpeg import hardware_engines, is_baseline_jpeg
from pipeline.render.settings import RenderSettings

dali_version: str = dali.__version__
GPU_BACKENDS = ("gpu", "gpu-hardware")
# Settings of each backend that change pixels, as a store records them beside the
# backend's name.
DECODERS = {
    "gpu": {"decoder": "CUDA (hw_decoder_load 0.0)"},
    "gpu-hardware": {
        "decoder": "hardware for baseline JPEG (hw_decoder_load 1.0, batches filled up), otherwise "
        "CUDA (0.0)"
    },
}
# What DALI says when it gets no memory, or no thread for want of memory.
_FULL = re.compile(
    "out of memory|bad_alloc|an't allocate|MemoryAllocation|Resource temporarily unavailable"
)


class Graph:
    """Runs DALI pipelines on encoded images, and rebuilds them after an undecodable
    image has killed them.

    Only ``gpu-hardware`` has two pipelines: one for the hardware decoder, one for CUDA.
    """

    # If true, outputs are valid as long as somebody holds them; otherwise, on a CPU, up
    # to the next run.
    lasting = False

    def __init__(self, batch_size: int, settings: RenderSettings) -> None:
        self.batch_size, self.settings, self.threads = (
            batch_size,
            settings,
            settings.decoder_threads,
        )
        self.backend = backend = settings.backend
        self.gpu, self.divides = backend in GPU_BACKENDS, backend == "gpu-hardware"
        if self.gpu and not torch.cuda.is_available():
            raise RenderError(
                f"pixels rendered on a GPU (render.backend: {backend}) need one, and torch finds "
                f"none here; use a machine that has one"
            )
        if self.divides and hardware_engines() == 0:
            raise RenderError(
                f"render.backend gpu-hardware needs a GPU with a JPEG decoder in hardware, as A100 "
                f"and H100 are, and {torch.cuda.get_device_name()} has none; "
                "use render.backend: gpu"
            )
        # Taken here, since torch's current device may differ in the thread that
        # renders.
        self.device = torch.cuda.current_device() if self.gpu else None
        self.pipes: dict[bool, dali.Pipeline] = {}  # the key is True for the hardware decoder

    def define(
        self, encoded: dali.data_node.DataNode, decode: Callable
    ) -> list[dali.data_node.DataNode]:
        """Return the pipeline's outputs for encoded images. decode: encoded images →
        whole decoded images."""
        raise NotImplementedError

    def run(
        self, blobs: Sequence[bytes], *, hardware: bool = False, **arguments: np.ndarray
    ) -> Sequence:
        """Feed encoded images and named arrays [len(blobs), …], and return DALI's
        outputs. On a GPU they are made in the order of torch's current stream.
        hardware: use the pipeline of the hardware decoder. Raises RenderError; for want
        of memory NoMemory, or torch's OutOfMemoryError on a GPU."""
        try:
            if hardware not in self.pipes:
                self.pipes[hardware] = self._built(hardware)
            pipe = self.pipes[hardware]
            pipe.feed_input("encoded", [np.frombuffer(blob, np.uint8) for blob in blobs])
            for name, array in arguments.items():
                pipe.feed_input(name, np.ascontiguousarray(array))
            return pipe.run(torch.cuda.current_stream()) if self.gpu else pipe.run()
        except (RuntimeError, MemoryError) as error:
            self.pipes.clear()  # DALI's pipelines don't outlive an error
            reason, full = (
                _reason(error),
                isinstance(error, MemoryError) or _FULL.search(str(error)),
            )
            if full and self.gpu:
                raise torch.OutOfMemoryError(
                    f"DALI is out of memory on the GPU ({reason})"
                ) from None
            said = f"DALI could not render it ({reason})"
            if full:
                raise NoMemory(said, 0 if len(blobs) == 1 else None) from None
            raise RenderError(said, *self._culprit(blobs)) from None

    def _built(self, hardware: bool) -> dali.Pipeline:
        # DALI's default executor lets outputs be kept, and on a GPU it returns them
        # without waiting for them.
        default = self.gpu or self.lasting
        executor = {} if default else {"exec_async": False, "exec_pipelined": False}
        pipe = dali.Pipeline(
            batch_size=self.batch_size,
            num_threads=self.threads,
            device_id=self.device,
            prefetch_queue_depth=1,
            **executor,
        )
        with pipe:
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            pipe.set_outputs(
                *self.define(encoded, lambda encoded: self._decoded(encoded, hardware))
            )
        pipe.build()
        return pipe

    def _decoded(self, encoded: dali.data_node.DataNode, hardware: bool) -> dali.data_node.DataNode:
        where = (
            {"device": "mixed", "hw_decoder_load": 1.0 if hardware else 0.0}
            if self.gpu
            else {"device": "cpu"}
        )
        return fn.decoders.image(
            encoded,
            output_type=types.RGB,
            adjust_orientation=self.settings.exif == "apply",
            jpeg_fancy_upsampling=True,
            **where,
        )

    def region(self, encoded: dali.data_node.DataNode, name: object) -> dali.data_node.DataNode:
        """Decode only a region of each image, on the CPU. The arguments ``start{name}``
        and ``shape{name}`` of ``run`` are int32 [n, 2], its top and left, and its
        height and width, in pixels."""
        start, shape = (
            fn.external_source(name=f"{what}{name}", dtype=types.INT32, ndim=1)
            for what in ("start", "shape")
        )
        return fn.decoders.image_slice(
            encoded,
            start=start,
            shape=shape,
            axes=[0, 1],
            output_type=types.RGB,
            adjust_orientation=self.settings.exif == "apply",
            jpeg_fancy_upsampling=True,
        )

    def _culprit(self, blobs: Sequence[bytes]) -> tuple[int | None, bool]:
        """Find the image that can't be decoded, by decoding each image alone, on the
        CPU and on the renderer's own backend. Returns the image's place, None if it
        isn't found, and True if only a GPU refuses the image."""
        for backend in dict.fromkeys(("cpu", self.backend)):
            look = WholeDecode(RenderSettings(backend=backend))
            for place, blob in enumerate(blobs):
                if look(blob) is None:
                    return place, backend != "cpu"
        return 0 if len(blobs) == 1 else None, False


class Decoder(Graph):
    """Decodes images on the CPU: whole, or with ``regions`` a region of each."""

    lasting = True

    def __init__(self, batch_size: int, settings: RenderSettings, *, regions: bool) -> None:
        super().__init__(batch_size, settings)
        self.regions = regions

    def define(
        self, encoded: dali.data_node.DataNode, decode: Callable
    ) -> list[dali.data_node.DataNode]:
        return [self.region(encoded, "") if self.regions else decode(encoded)]

    def __call__(self, blobs: Sequence[bytes], boxes: np.ndarray | None = None) -> Decoded:
        """Decode n images. boxes: int [n, 4], the regions: top, left, height and width
        in pixels. Raises RenderError."""
        arguments: dict[str, np.ndarray] = {}
        if boxes is not None:
            boxes = boxes.astype(np.int32)
            arguments = {"start": boxes[:, :2], "shape": boxes[:, 2:]}
        (images,) = self.run(blobs, hardware=False, **arguments)
        return Decoded(images, self.pipes[False])


class Decoded:
    """Decoded images in DALI's memory, which isn't copied.

    table: int64 [n, 3]: the address of each image's pixels, uint8 [height, width, 3],
    which lasts as long as this object; height, and width in pixels.
    """

    def __init__(self, images: dali.tensors.TensorListCPU, pipe: dali.Pipeline) -> None:
        # A failure drops the pipeline, which would take the memory with it.
        self.images, self.pipe = images, pipe
        self.table = np.array(
            [
                (image.data_ptr(), *shape[:2])
                for image, shape in zip(images, images.shape(), strict=True)
            ],
            np.int64,
        ).reshape(-1, 3)


class _OneImage(Graph):
    """Examines one image at a time. There is one image per pipeline, and one pipeline
    per thread.

    If one of several images in a pipeline fails, destroying the pipeline while its
    other images are still being decoded crashes DALI 2.4 (a segmentation fault within a
    few dozen failures, measured).
    """

    def __init__(self, settings: RenderSettings) -> None:
        super().__init__(1, replace(settings, threads=1))

    def _culprit(self, blobs: Sequence[bytes]) -> tuple[int | None, bool]:
        return 0, self.gpu


class Header(_OneImage):
    """Reads from an image's header alone the size that the decoder will give it."""

    def define(
        self, encoded: dali.data_node.DataNode, decode: Callable
    ) -> list[dali.data_node.DataNode]:
        return [fn.peek_image_shape(encoded, adjust_orientation=self.settings.exif == "apply")]

    def __call__(self, blob: bytes) -> tuple[int, int] | None:
        """Return (height, width) in pixels; None if DALI can't read such an image."""
        try:
            (shape,) = self.run([blob])
        except RenderError:
            return None
        height, width = (int(length) for length in np.array(shape.at(0))[:2])
        return height, width


class WholeDecode(_OneImage):
    """Decodes an image whole, to learn its height and width, or that it can't be
    decoded."""

    def define(
        self, encoded: dali.data_node.DataNode, decode: Callable
    ) -> list[dali.data_node.DataNode]:
        return [decode(encoded)]

    def __call__(self, blob: bytes) -> tuple[int, int] | None:
        """Return (height, width) of the decoded image in pixels; None if it can't be
        decoded whole."""
        try:
            (image,) = self.run([blob], hardware=self.divides and is_baseline_jpeg(blob))
        except RenderError:
            return None
        return tuple(image.shape()[0][:2])


def _reason(error: Exception) -> str:
    lines = [
        line.strip() for line in str(error).split("encountered:")[-1].splitlines() if line.strip()
    ]
    return lines[0][:200] if lines else type(error).__name__


@contextmanager
def quiet_decoders() -> Iterator[None]:
    """Silence the messages of the decoders' C libraries about broken images, since the
    manifest gives better reasons. The libraries have no setting for silence.

    The libraries write to file descriptor 2. Python's own stderr moves to a copy of the
    descriptor meanwhile, and stays visible.
    """
    original, copy, nowhere = sys.stderr, os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        ours = original.fileno() == 2
    except (io.UnsupportedOperation, AttributeError, ValueError):
        ours = False  # Python's stderr is captured already
    if ours:
        sys.stderr = os.fdopen(
            os.dup(2), "w", buffering=1, encoding=original.encoding, errors=original.errors
        )
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
