"""Translate a student to ONNX, and compare its outputs with PyTorch's."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from textwrap import shorten

import torch

from pipeline.exchange.trained import ExportError
from pipeline.models.model import Model
from pipeline.models.timm_export import attention_by_steps

ONNX = "model.onnx"
BATCHES = (1, 3)  # images in the batches that compare ONNX Runtime with PyTorch
TOLERANCE = 1e-4  # largest total variation between ONNX Runtime's softmax and PyTorch's
# Weights of more bytes are stored beside the ONNX file, whose format ends at 2 GiB.
INSIDE = 2_000_000_000


def require_onnx() -> None:
    """Raise ExportError if a package is missing that model.onnx needs."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ExportError(
                f'{ONNX} needs the package {name} ({error}); install "offline-meal-v2[export]", or '
                f"leave it out with --no-onnx"
            ) from None


def write_onnx(model: Model, file: Path) -> dict:
    """Write the model as ONNX, and compare its outputs with PyTorch's.

    The network takes ``image``, float32 [batch, 3, size, size], normalised, and gives
    ``logits``, float32 [batch, classes]. Returns the largest differences of ONNX
    Runtime's outputs from PyTorch's (``logits``; ``total_variation`` of the softmax),
    on how many ``images``, the version of the ``runtime``, and the result of
    ``translate``. Raises ExportError if the network can't be translated, or if the
    total variation exceeds ``TOLERANCE``.
    """
    generator = torch.Generator().manual_seed(0)
    noise = [
        torch.randint(
            0,
            256,
            (n, model.image_size, model.image_size, 3),
            generator=generator,
            dtype=torch.uint8,
        )
        for n in BATCHES
    ]
    inputs = [model.normalise(pixels).contiguous() for pixels in noise]
    with torch.inference_mode():
        ours = torch.cat([model.module(x) for x in inputs])
    try:
        made = translate(model, file)
        theirs = torch.cat(run_onnx(file, inputs))
    except Exception as error:  # exporter, checker and runtime raise errors of any type
        # Tell the cause: the exporter's own message only says where to report an error.
        cause: BaseException = error
        while cause.__cause__ or cause.__context__:
            cause = cause.__cause__ or cause.__context__
        raise ExportError(
            f"{model.name} can't be made into ONNX ({shorten(str(cause), 160, placeholder=' …')}); "
            f"pass --no-onnx"
        ) from None
    logits = float((ours - theirs).abs().max())
    variation = float((ours.softmax(dim=1) - theirs.softmax(dim=1)).abs().sum(dim=1).max()) / 2
    if not variation <= TOLERANCE:  # true for NaN too
        raise ExportError(
            f"ONNX Runtime's softmax of {model.name} is off by {variation:.2g} in total "
            f"variation, more than {TOLERANCE:g}; pass --no-onnx, or use another onnxruntime than "
            f"{version('onnxruntime')}"
        )
    return {
        "logits": logits,
        "total_variation": variation,
        "images": len(ours),
        "runtime": version("onnxruntime"),
        **made,
    }


def translate(model: Model, file: Path) -> dict:
    """Write the model as ONNX.

    The weights are inside ``file``, or in ``file``.data if they are above ``INSIDE``
    bytes. Returns ``opset``, and ``weights_outside``: whether the weights are in
    ``file``.data.
    """
    outside = sum(tensor.nbytes for tensor in model.module.state_dict().values()) > INSIDE
    with _quiet(), attention_by_steps(model):
        program = torch.onnx.export(
            model.module,
            (torch.zeros(2, 3, model.image_size, model.image_size),),
            dynamo=True,
            input_names=["image"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
        _forget_origin(program)
        program.save(file, external_data=outside)
    return {"opset": program.model.opset_imports[""], "weights_outside": outside}


def run_onnx(file: Path, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the logits of each batch from ONNX Runtime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(session.run(["logits"], {"image": x.numpy()})[0]) for x in inputs]


def _forget_origin(program: torch.onnx.ONNXProgram) -> None:
    """Remove the exporter's notes on the source of each operation and tensor. The notes
    hold paths of this machine."""
    for graph in program.model.graphs():
        graph.metadata_props.clear()
        graph.doc_string = None
        for node in graph:
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
        for value in (*graph.inputs, *graph.initializers.values()):
            value.metadata_props.clear()


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's warnings and log lines, which are for its own
    developers."""
    loggers = [
        logging.getLogger(name)
        for name in ("torch", "torch.onnx", "torch.export", "onnxscript", "onnx_ir")
    ]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
