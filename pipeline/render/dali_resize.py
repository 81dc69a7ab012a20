"""Resize crops and central squares with DALI: on a GPU, and on the CPU for stores and
runs that versions before 0.10 began.

A crop is cut out of the decoded image and then resized (``fn.resize`` with a region
gives other pixels).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np
import torch
from nvidia import dali
from nvidia.dali import fn, types

from pipeline.render.dali import Graph
from pipeline.render.errors import RenderError
from pipeline.render.hardware_jpeg import is_baseline_jpeg
from pipeline.render.settings import RenderSettings
from pipeline.runtime.profiling import Clock
from pipeline.sampling.centre import centre

# A longer image, in multiples of its shorter side, is thin: evaluation resizes only its
# central square. Another number would change the pixels of evaluations.
THIN = 8
_INTERPOLATION = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}


class _Resizing(Graph):
    """Decodes and resizes into memory that is given.

    clock: adds up the time of decoding and resizing.
    """

    def __init__(self, batch_size: int, settings: RenderSettings, clock: Clock) -> None:
        super().__init__(batch_size, settings)
        self.clock = clock
        # The last outputs of each pipeline on a GPU, and the event after which the
        # outputs have been copied.
        self.lent: dict[bool, tuple] = {}

    def close(self) -> None:
        """Do nothing: DALI's threads end with its pipelines."""

    def fill(
        self, targets: Sequence[torch.Tensor], blobs: Sequence[bytes], **arguments: np.ndarray
    ) -> None:
        """Render encoded images into ``targets``, one tensor for each output, uint8
        [len(blobs), …] on the renderer's device."""
        if self.divides:
            baseline = np.array([is_baseline_jpeg(blob) for blob in blobs], dtype=bool)
            for hardware in (True, False):
                if len(rows := np.flatnonzero(baseline == hardware)):
                    self._fill_rows(targets, rows, blobs, arguments, hardware)
            return
        outputs = self.run(blobs, hardware=False, **arguments)
        for target, output in zip(targets, outputs, strict=True):
            if self.gpu:
                target.copy_(torch.from_dlpack(output.as_tensor()))
            else:
                np.copyto(target.numpy(), output.as_array())
        self._keep(False, outputs)

    def _fill_rows(
        self,
        targets: Sequence[torch.Tensor],
        rows: np.ndarray,
        blobs: Sequence[bytes],
        arguments: dict[str, np.ndarray],
        hardware: bool,
    ) -> None:
        """Render the images at ``rows``, int64 [n], by one decoder into the same rows
        of ``targets``."""
        filled = rows
        if hardware:
            # The first batch fixes how many images of a batch the hardware takes, so
            # all batches are filled up to the same size, with the smallest image.
            smallest = min(rows, key=lambda row: len(blobs[row]))
            filled = np.concatenate([rows, np.full(self.batch_size - len(rows), smallest)])
            # The hardware decoder writes without waiting for earlier work on the GPU
            # (seen on an H100 by others: torchcodec's pull request 1634). So it may
            # start only when the memory of the batch before has been read.
            for _, copied in self.lent.values():
                copied.synchronize()
        try:
            outputs = self.run(
                [blobs[row] for row in filled],
                hardware=hardware,
                **{name: array[filled] for name, array in arguments.items()},
            )
        except RenderError as error:
            if error.place is not None:
                error.place = int(filled[error.place])
            raise
        at = torch.from_numpy(rows).to(targets[0].device)
        for target, output in zip(targets, outputs, strict=True):
            target.index_copy_(0, at, torch.from_dlpack(output.as_tensor())[: len(rows)])
        self._keep(hardware, outputs)

    def _keep(self, hardware: bool, outputs: Sequence) -> None:
        """Hold a GPU's outputs until they have been copied, since DALI may use their
        memory again once the outputs are released."""
        if not self.gpu:
            return
        if hardware in self.lent:
            self.lent[hardware][1].synchronize()
        # A blocking event: a thread that waits for it leaves its core to the decoders.
        copied = torch.cuda.Event(blocking=True)
        copied.record()
        self.lent[hardware] = outputs, copied

    def __del__(self) -> None:
        with suppress(Exception):  # at the interpreter's end the GPU may be gone
            for _, copied in self.lent.values():
                copied.synchronize()


class DaliCrops(_Resizing):
    """Renders crops of images at one or several output sizes, from one decode per
    image. sizes: in pixels. views: crops of each image."""

    def __init__(
        self,
        sizes: Sequence[int],
        views: int,
        batch_size: int,
        settings: RenderSettings,
        clock: Clock,
    ) -> None:
        super().__init__(batch_size, settings, clock)
        self.sizes, self.views = sizes, views

    def define(
        self, encoded: dali.data_node.DataNode, decode: Callable
    ) -> list[dali.data_node.DataNode]:
        outputs = []
        image = None if self.views == 1 and not self.gpu else decode(encoded)
        for view in range(self.views):
            flip = fn.external_source(name=f"flip{view}", dtype=types.INT32, ndim=0)
            if image is None:
                cut = self.region(encoded, view)
            else:
                start, shape = (
                    fn.external_source(name=f"{what}{view}", dtype=types.INT32, ndim=1)
                    for what in ("start", "shape")
                )
                cut = fn.slice(image, start=start, shape=shape, axes=[0, 1])
            for size in self.sizes:
                resized = fn.resize(
                    cut,
                    size=[size, size],
                    interp_type=_INTERPOLATION[self.settings.interpolation],
                    antialias=True,
                )
                outputs.append(fn.flip(resized, horizontal=flip))
        return outputs

    def render(
        self,
        made: dict[int, torch.Tensor],
        blobs: Sequence[bytes],
        boxes: np.ndarray,
        flips: np.ndarray,
    ) -> None:
        """Render as ``CropRenderer`` does, into ``made``: output size → uint8 [views,
        n, size, size, 3]."""
        arguments: dict[str, np.ndarray] = {}
        for view in range(self.views):
            box = boxes[view].astype(np.int32)
            arguments |= {
                f"start{view}": box[:, :2],
                f"shape{view}": box[:, 2:],
                f"flip{view}": flips[view].astype(np.int32),
            }
        targets = [made[size][view] for view in range(self.views) for size in self.sizes]
        with self.clock.part("decode and resize"):
            self.fill(targets, blobs, **arguments)


class DaliCentre(_Resizing):
    """Renders central squares (``CentreRenderer``).

    Of a thin image, longer than ``THIN`` times its shorter side, only the central
    square is resized. Its pixels are those of the whole resize, to one level of 255.
    The whole resize would take 11 GB for 1 × 60,000 pixels at 224 px.

    looks: (output size in pixels, interpolation) of each model.
    """

    def __init__(
        self,
        looks: Sequence[tuple[int, str]],
        batch_size: int,
        settings: RenderSettings,
        clock: Clock,
    ) -> None:
        super().__init__(batch_size, settings, clock)
        self.looks = looks

    def define(
        self, encoded: dali.data_node.DataNode, decode: Callable
    ) -> list[dali.data_node.DataNode]:
        image = decode(encoded)
        outputs = []
        for i, (size, interpolation) in enumerate(self.looks):
            low, high, whole = (
                fn.external_source(name=f"{name}{i}", dtype=types.FLOAT, ndim=1)
                for name in ("low", "high", "whole")
            )
            start = fn.external_source(name=f"start{i}", dtype=types.INT32, ndim=1)
            resized = fn.resize(
                image,
                roi_start=low,
                roi_end=high,
                size=whole,
                interp_type=_INTERPOLATION[interpolation],
                antialias=True,
            )
            outputs.append(fn.slice(resized, start=start, shape=[size, size], axes=[0, 1]))
        return outputs

    def render(
        self,
        made: dict[tuple[int, str], torch.Tensor],
        blobs: Sequence[bytes],
        height: np.ndarray,
        width: np.ndarray,
    ) -> None:
        """Render as ``CentreRenderer`` does, into ``made``: (size, interpolation) →
        uint8 [n, size, size, 3]."""
        arguments: dict[str, np.ndarray] = {}
        shape = np.stack([height, width], axis=1).astype(np.int64)
        thin = shape.max(axis=1, keepdims=True) > THIN * shape.min(axis=1, keepdims=True)
        for i, (size, _) in enumerate(self.looks):
            whole, start = centre(shape, size)
            # The region of the decoded image that is resized, in its own pixels.
            low = np.where(thin, start * shape / whole, 0).astype(np.float32)
            high = np.where(thin, (start + size) * shape / whole, shape).astype(np.float32)
            arguments |= {
                f"low{i}": low,
                # Beyond 16 million pixels float32 has no fractions: one step at least.
                f"high{i}": np.maximum(high, np.nextafter(low, np.float32(np.inf))),
                f"whole{i}": np.where(thin, size, whole).astype(np.float32),
                f"start{i}": np.where(thin, 0, start).astype(np.int32),
            }
        with self.clock.part("decode and resize"):
            self.fill([made[look] for look in self.looks], blobs, **arguments)
