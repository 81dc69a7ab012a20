"""Write images into tar files, parquet files and lists, as people have them."""

from __future__ import annotations

import csv
import io
import json
import random
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path


def images_of(folder: Path) -> list[Path]:
    """Return the files of class folders, in a random order that is always the same."""
    files = sorted(folder.glob("*/*"))
    random.Random(0).shuffle(files)
    return files


def write_tar(
    path: Path, members: Sequence[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT
) -> Path:
    """Write a tar file of these names and contents."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as out:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), 1.5  # as WebDataset's writer has it
            out.addfile(info, io.BytesIO(content))
    return path


def parts(files: Sequence[Path], n: int = 3) -> list[Sequence[Path]]:
    """Divide files into ``n`` parts."""
    return [files[i::n] for i in range(n)]


def as_shards(folder: Path, out: Path) -> Path:
    """WebDataset's shards with .cls, and the file's name in .json."""
    classes = sorted(place.name for place in folder.iterdir())
    for i, some in enumerate(parts(images_of(folder))):
        members = []
        for file in some:
            index, name = classes.index(file.parent.name), f"{file.parent.name}/{file.name}"
            about = json.dumps({"filename": name, "label": index}).encode()
            key = f"{file.parent.name}_{file.stem}"
            members += [
                (f"{key}.cls", str(index).encode()),
                (f"{key}.jpg", file.read_bytes()),
                (f"{key}.json", about),
            ]
        write_tar(out / f"photos-train-{i:06d}.tar", members)
    return out


def as_class_names(folder: Path, out: Path) -> Path:
    """Shards whose .cls is the class's name."""
    for i, some in enumerate(parts(images_of(folder))):
        members = []
        for file in some:
            members += [
                (f"{i}{file.stem}{file.parent.name}.jpg", file.read_bytes()),
                (f"{i}{file.stem}{file.parent.name}.cls", file.parent.name.encode()),
            ]
        write_tar(out / f"{i:05d}.tar", members)
    return out


def as_plain_shards(folder: Path, out: Path) -> Path:
    """img2dataset's shards: numbered keys, a caption, a .json, no class."""
    n = 0
    for i, some in enumerate(parts(images_of(folder))):
        members = []
        for file in some:
            members += [
                (f"{n:09d}.jpg", file.read_bytes()),
                (f"{n:09d}.txt", b"a caption"),
                (f"{n:09d}.json", json.dumps({"key": f"{n:09d}", "url": "x"}).encode()),
            ]
            n += 1
        write_tar(out / f"{i:05d}.tar", members)
    return out


def as_class_tars(folder: Path, out: Path) -> Path:
    """ImageNet's layout: a tar file per class."""
    for place in sorted(folder.iterdir()):
        members = [(file.name, file.read_bytes()) for file in sorted(place.iterdir())]
        write_tar(out / f"{place.name}.tar", members, tarfile.GNU_FORMAT)
    return out


def as_tar_of_tars(folder: Path, out: Path) -> Path:
    """ILSVRC2012_img_train.tar: a tar file of a tar file per class."""
    inner = as_class_tars(folder, out / "inner")
    members = [(file.name, file.read_bytes()) for file in sorted(inner.iterdir())]
    return write_tar(out / "photos_img_train.tar", members, tarfile.USTAR_FORMAT)


def as_one_tar(folder: Path, out: Path) -> Path:
    """tar cf photos.tar -C DATA train."""
    path = out / "photos.tar"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        file.add(folder, "train")
    return path


def as_list(folder: Path, out: Path) -> Path:
    """A list beside the folder that it names."""
    path = folder.with_suffix(".csv")
    with open(path, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["class", "file_name"])
        for image in images_of(folder):
            rows.writerow([image.parent.name, f"{image.parent.name}/{image.name}"])
    return path


def parquet(**how: object) -> Callable[[Path, Path], Path]:
    """Return a writer of two parquet files, as Hugging Face's datasets writes them.
    how: as pyarrow's write_table takes it."""

    def write(folder: Path, out: Path) -> Path:
        import pyarrow as pa
        from pyarrow import parquet

        classes = sorted(place.name for place in folder.iterdir())
        features = {
            "image": {"_type": "Image"},
            "label": {"names": classes, "_type": "ClassLabel"},
        }
        metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
        for i, some in enumerate(parts(images_of(folder), 2)):
            table = pa.table(
                {
                    "image": pa.array(
                        [{"bytes": file.read_bytes(), "path": file.name} for file in some],
                        pa.struct({"bytes": pa.binary(), "path": pa.string()}),
                    ),
                    "label": pa.array([classes.index(file.parent.name) for file in some]),
                }
            ).replace_schema_metadata(metadata)
            place = out / "data" / f"train-{i:05d}-of-00002.parquet"
            place.parent.mkdir(parents=True, exist_ok=True)
            parquet.write_table(table, place, row_group_size=10, **how)
        return out

    return write


PLAIN = {"compression": "none", "use_dictionary": False}
FORMS = {
    "shards": as_shards,
    "class names": as_class_names,
    "class tars": as_class_tars,
    "tar of tars": as_tar_of_tars,
    "one tar": as_one_tar,
    "list": as_list,
    "parquet": parquet(**PLAIN),
    "parquet of pages 2": parquet(**PLAIN, data_page_version="2.0"),
    "snappy": parquet(compression="snappy", use_dictionary=False),
    "dictionary": parquet(compression="none"),
}
# Forms under whose names the images are the class folders' own.
SAME_NAMES = [form for form in FORMS if form != "class names"]
