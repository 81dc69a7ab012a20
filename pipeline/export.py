"""A trained student for others: a folder as timm's hub has them, its network for ONNX Runtime, and a card that says how it was made."""

from __future__ import annotations

import importlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from textwrap import shorten

import jinja2
import numpy as np
import safetensors
import torch
import yaml

from cache import LabelStore
from cache.claims import claim, claims_of
from cache.disk import make_folder, sync_folder, sync_tree
from cache.schema import MealError, StoreError, printable
from pipeline import config as configs
from pipeline.config import Config, ModelSpec
from pipeline.models import METADATA, Model, attention_by_steps, load, save_for_timm
from pipeline.progress import duration
from pipeline.start import SCANS

ONNX = "model.onnx"
BATCHES = (1, 3)  # images of the batches on which ONNX Runtime is compared with PyTorch
TOLERANCE = 1e-4  # total variation of their softmax
INSIDE = 2_000_000_000  # bytes of weights above which they lie beside the ONNX file, whose format ends at 2 GiB
SAID = ("model", "classes", "image_size", "labels", "source", "epoch")  # what train-student writes into the header of every checkpoint


class ExportError(MealError):
    """A run that can't be exported, or not to this place."""


@dataclass(frozen=True)
class Trained:
    """A checkpoint of a run, and what the run tells of it."""

    file: Path
    facts: dict  # the checkpoint's header
    config: Config
    passes: list[dict]  # metrics.jsonl
    figures: dict  # of those, the pass that the checkpoint is of
    validated: int | None  # images of the validation, if the run tells
    class_names: list[str] | None  # of the outputs, in order
    teachers: list[str]  # timm names, without paths; empty if there were none, or if neither checkpoint nor store tells
    # The crop policy, as a store has it. None if the run had a store that wasn't given: of imported crops config.yaml has defaults.
    drawn: dict | None
    imported: dict | None  # what labels of others were imported from

    @property
    def origin(self) -> dict:
        """Where the weights come from, for config.json."""
        kept = {key: self.facts.get(key) for key in ("labels", "source", "epoch", "val_top1")}
        return {"model": public(self.facts["model"]), "weights": self.file.stem, "teachers": self.teachers, **kept}

    @property
    def epochs(self) -> int:
        """Done so far."""
        return self.passes[-1]["epoch"] + 1

    @property
    def images(self) -> int:
        """Crops that the student saw in all of them."""
        return sum(one["images"] for one in self.passes)

    @property
    def seconds(self) -> float:
        return sum(one["seconds"] for one in self.passes)


def export(run: Path, out: Path, *, weights: str = "best", onnx: bool = True, store: Path | None = None) -> dict:
    """Make the folder ``out`` of a checkpoint of ``run``: config.json, model.safetensors, README.md and model.onnx; whole, or not at all.

    weights: "best" or "last". onnx: whether to make model.onnx. store: the one that the run was trained from, which tells more of its
    teachers. Returns what was made and what was measured of it. Raises MealError if the run, the store or the place won't do, if timm makes
    another model of the folder, or if ONNX Runtime's softmax is off by more than ``TOLERANCE``.
    """
    if onnx:
        require_onnx()
    target = Path(os.path.realpath(out))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ExportError(f"{out} is {'not empty' if target.is_dir() else 'a file'}; choose another --out")
    labels = LabelStore.open(store) if store else None
    trained = read_run(run, weights, labels)
    with torch.random.fork_rng(devices=[]), claim(claims_of(target), "export") as mine:
        if not mine:
            raise ExportError(f"another process is exporting to {out}; wait for it, or choose another --out")
        model = load(ModelSpec(model=trained.facts["model"], checkpoint=str(trained.file)))
        if _header(trained.file) != trained.facts:
            raise ExportError(f"{trained.file} was written anew while it was read, since its run goes on; run this command again")
        model.module.to(memory_format=torch.contiguous_format)  # as timm makes it, and as the exporter to ONNX wants it
        with _whole(target) as scratch:
            save_for_timm(model, scratch, trained.class_names, trained.origin)
            measured = write_onnx(model, scratch / ONNX) if onnx else None
            (scratch / "README.md").write_text(card(target.name, trained, model, labels, measured), encoding="utf-8")
    return {
        "folder": str(out),
        "run": str(run),
        "weights": trained.file.name,
        "model": trained.origin["model"],
        "digest": model.digest(),
        "classes": model.classes,
        "class_names": trained.class_names is not None,
        "image_size": model.image_size,
        "epoch": trained.facts["epoch"],
        "epochs_done": trained.epochs,
        "epochs": trained.config.train.epochs,
        "validation_images": trained.validated,
        **{key: trained.figures.get(key) for key in ("val_top1", "val_top5", "val_loss", "loss", "kl", "agreement")},
        "onnx": measured,
        "files": {path.name: path.stat().st_size for path in sorted(target.iterdir())},
    }


def summary(result: dict) -> list[str]:
    """Lines for people of what ``export`` returns."""
    top = "" if result["val_top1"] is None else f", top-1 {result['val_top1']:.2f} %"
    files, onnx = result["files"], result["onnx"]
    lines = [
        f"{result['folder']}: {result['model']}, {result['classes']:,} classes, {result['image_size']} px, "
        f"epoch {result['epoch'] + 1} of {result['epochs_done']} done ({result['weights']}){top}",
        f'  model.safetensors  {files["model.safetensors"] / 2**20:,.1f} MiB; timm.create_model("local-dir:{result["folder"]}", '
        "pretrained=True) gives the same logits, bit for bit",
    ]
    if onnx:
        size = sum(size for name, size in files.items() if name.startswith(ONNX))
        lines.append(
            f"  {ONNX}         {size / 2**20:,.1f} MiB; on {onnx['images']} random inputs its logits are within "
            f"{onnx['logits']:.1e} of PyTorch's, its softmax within {onnx['total_variation']:.1e} in total variation"
        )
    lines.append("  README.md          the model card; choose a license in it before you publish it")
    return [printable(line) for line in lines]


def read_run(run: Path, weights: str, store: LabelStore | None = None) -> Trained:
    """What a run directory holds. Raises ExportError, in one line, if that isn't all that a card needs, or doesn't belong together."""
    for name in ("config.yaml", "metrics.jsonl"):
        if not (run / name).is_file():
            raise ExportError(
                f"{run} is no run of train-student with a finished epoch (it has no {name}); check the path, or finish an epoch"
            )
    file = run / f"{weights}.safetensors"
    facts, config, passes = _header(file), configs.load(run / "config.yaml"), _passes(run / "metrics.jsonl")
    if config.student is None:
        raise ExportError(f"{run / 'config.yaml'} names no student, so it is not what train-student wrote; restore it from a copy")
    figures = next((one for one in passes if one["epoch"] == facts["epoch"]), None)
    if figures is None or figures.get("val_top1") != facts.get("val_top1", figures.get("val_top1")):
        raise ExportError(
            f"{file} is of epoch {facts['epoch'] + 1}, of which metrics.jsonl has {'other' if figures else 'no'} figures; "
            "run the same train-student command again to finish that epoch, and then this, or pass the other --weights"
        )
    if store is not None and store.identity.hex() != facts["source"]:
        raise StoreError(
            f"{store.path} (identity {store.identity.hex()[:12]}…) isn't what {run} was trained from ({facts['source'][:12]}…); "
            "pass that store, or leave --store out"
        )
    names = facts.get("class_names") or (store.class_names if store else None)  # checkpoints before 0.5 had none
    if names is not None and len(names) != facts["classes"]:
        raise ExportError(f"{file} has {facts['classes']} classes and names {len(names)}; restore it from a copy")
    teachers = facts.get("teachers") or []
    if store and facts["labels"] == "soft":
        teachers = [teacher["model"] for teacher in store.provenance["teachers"]]
    if store:
        drawn, imported = store.provenance["crops"], store.provenance.get("imported")
    else:
        without_store = config.train.online or (run / SCANS[0]).is_file()
        drawn, imported = config.crops.model_dump(mode="json") if without_store else None, facts.get("imported")
    return Trained(
        file, facts, config, passes, figures, _validated(run, figures), names, [public(name) for name in teachers], drawn, imported
    )


def _header(file: Path) -> dict:
    """What train-student says of a checkpoint in its header."""
    if not file.is_file():
        raise ExportError(f"there is no {file}; check the path, or run train-student again until an epoch is finished")
    try:
        with safetensors.safe_open(file, "pt") as f:
            facts = json.loads((f.metadata() or {}).get(METADATA, "{}"))
    except Exception as error:  # a damaged file fails in many ways
        raise ExportError(f"{file} is damaged ({shorten(str(error), 120, placeholder=' …')}); restore it from a copy") from None
    if missing := [key for key in SAID if facts.get(key) is None]:
        raise ExportError(f"{file} was not written by train-student (its header doesn't say its {missing[0]}); pass a run of train-student")
    return facts


def _passes(file: Path) -> list[dict]:
    try:
        passes = [json.loads(line) for line in file.read_text().splitlines()]
        if not all({"epoch", "loss", "images", "seconds"} <= one.keys() for one in passes):
            raise ValueError("a line lacks its epoch, loss, images or seconds")
    except (ValueError, AttributeError) as error:
        raise ExportError(f"{file} is damaged ({shorten(str(error), 120, placeholder=' …')}); restore it from a copy") from None
    return passes


def _validated(run: Path, figures: dict) -> int | None:
    """How many images were validated on, as the run's last start found them; None if none were, or if the figures can't be of so many."""
    if "val_top1" not in figures:
        return None
    try:
        with np.load(run / SCANS[1], allow_pickle=False) as kept:
            images = len(kept["bytes"])
    except Exception:  # there is none, as before 0.4, or a damaged one, which can raise anything
        return None
    hits = images * figures["val_top1"] / 100
    return images if images and abs(hits - round(hits)) < 1e-6 else None


def public(name: str) -> str:
    """A model's name without a path of this machine: of local-dir:FOLDER the folder's own name."""
    source, colon, place = name.partition(":")
    return f"{source}:{Path(place).name}" if colon and source == "local-dir" else name


@contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """A folder to fill beside ``target``, which takes its place once it is on the disk; if anything fails, nothing is left."""
    scratch = target.with_name(f".{target.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)  # of one that was killed
    try:
        make_folder(scratch)
        yield scratch
        for path in scratch.iterdir():
            path.chmod(0o644)  # safetensors writes for its owner's eyes only
        sync_tree(scratch)
        os.rename(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    sync_folder(target.parent)


def require_onnx() -> None:
    """Raises ExportError if a package is missing that model.onnx needs."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ExportError(
                f'{ONNX} needs the package {name} ({error}); install "offline-meal-v2[export]", or leave it out with --no-onnx'
            ) from None


def write_onnx(model: Model, file: Path) -> dict:
    """The model as ONNX: ``image`` float32 [batch, 3, size, size], normalised, → ``logits`` float32 [batch, classes].

    Returns the largest differences of ONNX Runtime's outputs from PyTorch's (``logits``; ``total_variation`` of the softmax), on how many
    ``images``, and what ``translate`` does. Raises ExportError if the network can't be translated, or if the total variation exceeds
    ``TOLERANCE``.
    """
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randint(0, 256, (n, model.image_size, model.image_size, 3), generator=generator, dtype=torch.uint8) for n in BATCHES]
    inputs = [model.normalise(pixels).contiguous() for pixels in noise]
    with torch.inference_mode():
        ours = torch.cat([model.module(x) for x in inputs])
    try:
        made = translate(model, file)
        theirs = torch.cat(run_onnx(file, inputs))
    except Exception as error:  # exporter, checker and runtime raise whatever they like
        while error.__cause__ or error.__context__:  # the exporter's own message only says where to report it
            error = error.__cause__ or error.__context__
        raise ExportError(f"{model.name} can't be made into ONNX ({shorten(str(error), 160, placeholder=' …')}); pass --no-onnx") from None
    logits = float((ours - theirs).abs().max())
    variation = float((ours.softmax(dim=1) - theirs.softmax(dim=1)).abs().sum(dim=1).max()) / 2
    if not variation <= TOLERANCE:  # nor what isn't a number
        raise ExportError(
            f"ONNX Runtime's softmax of {model.name} is off by {variation:.2g} in total variation, more than {TOLERANCE:g}; "
            f"pass --no-onnx, or use another onnxruntime than {version('onnxruntime')}"
        )
    return {"logits": logits, "total_variation": variation, "images": len(ours), "runtime": version("onnxruntime"), **made}


def translate(model: Model, file: Path) -> dict:
    """Write the model as ONNX, with its weights inside, or in ``file``.data where they are above ``INSIDE`` bytes. Returns
    ``opset``, and whether it has ``weights_outside``."""
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
    """The logits of each batch, from ONNX Runtime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(session.run(["logits"], {"image": x.numpy()})[0]) for x in inputs]


def _forget_origin(program: torch.onnx.ONNXProgram) -> None:
    """The exporter notes for each operation and tensor where in the source it comes from, with paths of this machine."""
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
    """Without the warnings and log lines of the exporter, which are for its own developers."""
    loggers = [logging.getLogger(name) for name in ("torch", "torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
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


def card(title: str, trained: Trained, model: Model, store: LabelStore | None, onnx: dict | None) -> str:
    """The model card, Markdown with a head in YAML: only what the run, the store and this export tell."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"code": _code, "duration": duration, "public": public}
    soft, train = trained.facts["labels"] == "soft", trained.config.train
    student = trained.config.student
    tags = [
        "image-classification",
        "timm",
        *(["knowledge-distillation"] if soft else []),
        *(["meal-v2"] if soft and not trained.imported else []),
        *(["onnx"] if onnx else []),
    ]
    head = {"library_name": "timm", "pipeline_tag": "image-classification", "tags": tags}
    return environment.get_template("card.md").render(
        head=yaml.safe_dump(head, sort_keys=False),
        title=printable(title),
        architecture=model.module.pretrained_cfg["architecture"],
        trained=trained,
        facts=trained.facts,
        figures=trained.figures,
        config=trained.config,
        soft=soft,
        recipe=configs.flat(train.model_dump(mode="json")),
        model=model,
        parameters=sum(p.numel() for p in model.module.parameters()) / 1e6,
        digest=model.digest(),
        start=Path(student.checkpoint).name if student.checkpoint else None,
        store=store,
        onnx=onnx,
        versions={name: version(name) for name in ("timm", "torch")},
    )


def _code(value: object) -> str:
    """Anything as code of Markdown, in a table too: names come from folders and from other people's stores."""
    text = printable(value if isinstance(value, str) else json.dumps(value))
    return f"`{text.replace('`', chr(39)).replace('|', chr(92) + '|')}`"
