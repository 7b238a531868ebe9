"""Small copies of the benchmarks' data sets, written in the formats of the real ones.

Image `index` of class `label` is of one grey, `shade(label, index)`, so that a source can be checked pixel by pixel.
Every split has `per_class` images of each class, listed class after class within each index.
"""

import gzip
import io
import json
import pickle
import struct
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

WNIDS = ["n01440764", "n01443537", "n01484850", "n01491361"]
STEP = {"train": 0, "val": 10, "test": 20}  # added to the index of an image of a split: no grey occurs twice


def shade(label: int, index: int) -> int:
    return 10 + 60 * label + index


def put(path: Path, grey: int, size: int = 8) -> Path:
    """An image of one grey; its format follows the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    form = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG"}[path.suffix.lower()]
    Image.new("RGB", (size, size), (grey,) * 3).save(path, form, **({"quality": 95} if form == "JPEG" else {}))
    return path


def text(path: Path, lines: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def every(split: str, classes: int, per_class: int) -> Iterator[tuple[int, int]]:
    """(label, index) of the images of a split."""
    for index in range(per_class):
        for label in range(classes):
            yield label, STEP[split] + index


def aircraft(root: Path, per_class: int = 2, size: int = 8) -> Path:
    top, variants = root / "fgvc-aircraft-2013b/data", ["707-320", "Challenger 600", "F/A-18"]
    text(top / "variants.txt", variants)
    rows = {}
    for split in ("train", "val", "test"):
        rows[split] = []
        for label, index in every(split, 3, per_class):
            number = f"{1000 * label + index:07d}"
            put(top / f"images/{number}.jpg", shade(label, index), size)
            rows[split].append(f"{number} {variants[label]}")
    rows["trainval"] = rows["train"] + rows["val"]
    for split, lines in rows.items():
        text(top / f"images_variant_{split}.txt", lines)
    return top


def caltech101(root: Path, counts: tuple[int, ...] = (33, 31, 40), size: int = 8) -> Path:
    """Image i of a class is of grey 2 * i + label."""
    top = root / "caltech101/101_ObjectCategories"
    for label, (name, count) in enumerate(zip(["BACKGROUND_Google", "Faces", "accordion"], counts, strict=True)):
        for index in range(count):
            put(top / f"{name}/image_{index + 1:04d}.jpg", 2 * index + label, size)
    (top / "BACKGROUND_Google/tmp").write_text("the set has such a file")
    return top


def cars(root: Path, per_class: int = 2, size: int = 8) -> Path:
    top, names = root / "stanford_cars", ["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "smart fortwo 2012"]
    (top / "devkit").mkdir(parents=True)
    savemat(top / "devkit/cars_meta.mat", {"class_names": np.array([names], dtype=object)})
    boxes = ["bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2"]
    files = {"train": top / "devkit/cars_train_annos.mat", "test": top / "cars_test_annos_withlabels.mat"}
    for split, path in files.items():
        images = list(every(split, 3, per_class))
        table = np.zeros((1, len(images)), dtype=[(field, object) for field in [*boxes, "class", "fname"]])
        for number, (label, index) in enumerate(images):
            name = f"{number + 1:05d}.jpg"
            put(top / f"cars_{split}/{name}", shade(label, index), size)
            table[0, number] = (1, 2, 3, 4, np.uint8(label + 1), name)
        savemat(path, {"annotations": table})
    return top


class Python2Pickler(pickle._Pickler):
    """Writes both bytes and text as the byte strings of Python 2."""

    dispatch = dict(pickle._Pickler.dispatch)  # noqa: RUF012

    def save_string(self, value):
        data = value.encode() if isinstance(value, str) else value
        if len(data) < 256:
            self.write(pickle.SHORT_BINSTRING + bytes([len(data)]) + data)
        else:
            self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_string


def python2_pickle(path: Path, content: object) -> Path:
    buffer = io.BytesIO()
    Python2Pickler(buffer, 2).dump(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
    return path


def cifar_images(labels: list[int], start: int) -> np.ndarray:
    """Rows of 3072 bytes, [n, 3072]: red is the shade, green the row, blue the column."""
    rows, columns = np.mgrid[:32, :32]
    images = [
        np.stack([np.full((32, 32), shade(label, start + number)), rows, columns])
        for number, label in enumerate(labels)
    ]
    return np.array(images, dtype=np.uint8).reshape(len(labels), 3072)


def cifar10(root: Path, per_batch: int = 4) -> Path:
    top = root / "cifar-10-batches-py"
    python2_pickle(top / "batches.meta", {b"label_names": [b"airplane", b"automobile", b"bird"], b"num_vis": 3072})
    for number, name in enumerate([*(f"data_batch_{batch}" for batch in range(1, 6)), "test_batch"]):
        labels = [(number + image) % 3 for image in range(per_batch)]
        names = [f"picture_{image}.png".encode() for image in range(per_batch)]
        content = {b"data": cifar_images(labels, per_batch * number), b"labels": labels}
        python2_pickle(top / name, {b"batch_label": b"one", b"filenames": names, **content})
    return top


def cifar100(root: Path, count: int = 6) -> Path:
    top = root / "cifar-100-python"
    names = {b"fine_label_names": [b"apple", b"bear", b"cup"], b"coarse_label_names": [b"fruit", b"other"]}
    python2_pickle(top / "meta", names)
    for start, split in ((0, "train"), (20, "test")):
        fine = [image % 3 for image in range(count)]
        content = {
            b"data": cifar_images(fine, start),
            b"fine_labels": fine,
            b"coarse_labels": [int(f > 0) for f in fine],
        }
        python2_pickle(top / split, content)
    return top


def dtd(root: Path, per_class: int = 2, size: int = 8) -> Path:
    top, names = root / "dtd/dtd", ["banded", "lacelike", "zigzagged"]  # as torchvision unpacks it
    for split in ("train", "val", "test"):
        lines = []
        for label, index in every(split, 3, per_class):
            lines.append(f"{names[label]}/{names[label]}_{index:04d}.jpg")
            put(top / "images" / lines[-1], shade(label, index), size)
        text(top / f"labels/{split}1.txt", lines)
        text(top / f"labels/{split}2.txt", lines[::-1])
    return top


def flowers(root: Path, per_class: int = 2, size: int = 8) -> Path:
    top, labels, parts = root / "flowers-102", [], {}
    for split, key in (("test", "tstid"), ("val", "valid"), ("train", "trnid")):
        parts[key] = []
        for label, index in every(split, 3, per_class):
            labels.append(label + 1)
            parts[key].append(len(labels))
            put(top / f"jpg/image_{len(labels):05d}.jpg", shade(label, index), size)
    savemat(top / "imagelabels.mat", {"labels": np.array([labels], dtype=np.uint8)})
    savemat(top / "setid.mat", {key: np.array([numbers], dtype=np.uint16) for key, numbers in parts.items()})
    return top


def food(root: Path, per_class: int = 2, size: int = 8) -> Path:
    top, names = root / "food-101", ["apple_pie", "baklava", "waffles"]
    text(top / "meta/classes.txt", names)
    for split in ("train", "test"):
        lines = []
        for label, index in every(split, 3, per_class):
            lines.append(f"{names[label]}/{1000 + index}")
            put(top / f"images/{lines[-1]}.jpg", shade(label, index), size)
        text(top / f"meta/{split}.txt", lines)
    return top


def pets(root: Path, per_class: int = 2, size: int = 8) -> Path:
    top, breeds = root / "oxford-iiit-pet", ["Abyssinian", "american_bulldog", "yorkshire_terrier"]
    for split, file in (("train", "trainval"), ("test", "test")):
        lines = []
        for label, index in every(split, 3, per_class):
            lines.append(f"{breeds[label]}_{index + 1} {label + 1} {1 if label == 0 else 2} {max(label, 1)}")
            put(top / f"images/{breeds[label]}_{index + 1}.jpg", shade(label, index), size)
        text(top / f"annotations/{file}.txt", lines)
    return top


def sun397(root: Path, per_class: int = 2, size: int = 8) -> Path:
    """Classes of one name within another, and one that is two folders deep."""
    top, names = root / "SUN397", ["/a/abbey", "/c/church/indoor", "/c/church"]
    text(root / "Partitions/ClassName.txt", names)
    for split, file in (("train", "Training_01"), ("test", "Testing_01")):
        lines = []
        for label, index in every(split, 3, per_class):
            lines.append(f"{names[label]}/sun_a{label}{index:03d}.jpg")
            put(top / lines[-1].lstrip("/"), shade(label, index), size)
        text(root / f"Partitions/{file}.txt", lines)
    return top


VOC_ROWS = [(1, -1, 0), (-1, 1, -1), (1, 1, -1), (-1, 0, 1)]  # labels of four images, for each split


def voc2007(root: Path, repeats: int = 1, size: int = 8) -> Path:
    top, names, start = root / "VOCdevkit/VOC2007", ["aeroplane", "bicycle", "tvmonitor"], 0
    images: dict[str, list[str]] = {}
    for split in ("train", "val", "test"):
        images[split] = [f"{start + number + 1:06d}" for number in range(4 * repeats)]
        for number, image in enumerate(images[split]):
            put(top / f"JPEGImages/{image}.jpg", 10 + start + number, size)
        start += 4 * repeats
    images["trainval"] = images["train"] + images["val"]
    for split, listed in images.items():
        text(top / f"ImageSets/Main/{split}.txt", listed)
        for column, name in enumerate(names):
            rows = [f"{image} {VOC_ROWS[number % 4][column]:2d}" for number, image in enumerate(listed)]
            text(top / f"ImageSets/Main/{name}_{split}.txt", rows)
    return top


def cub(root: Path, per_class: int = 2, size: int = 8) -> Path:
    top, names = root / "CUB_200_2011", ["001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross"]
    lists: dict[str, list[str]] = {"images": [], "image_class_labels": [], "train_test_split": [], "bounding_boxes": []}
    number = 0
    for split in ("train", "test"):
        for label, index in every(split, 3, per_class):
            number += 1
            name = f"{names[label]}/{names[label][4:]}_{index:04d}.jpg"
            put(top / f"images/{name}", shade(label, index), size)
            lists["images"].append(f"{number} {name}")
            lists["image_class_labels"].append(f"{number} {label + 1}")
            lists["train_test_split"].append(f"{number} {int(split == 'train')}")
            lists["bounding_boxes"].append(f"{number} 1.0 2.0 3.0 4.0")
    lists["classes"] = [f"{label + 1} {name}" for label, name in enumerate(names)]
    for name, lines in lists.items():
        text(top / f"{name}.txt", lines)
    return top


def cub_archive(root: Path, per_class: int = 2, size: int = 8) -> Path:
    """CUB as its archive alone."""
    top, archive = cub(root / "unpacked", per_class, size), root / "CUB_200_2011.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(top, top.name)
    return archive


def class_folders(
    top: Path, wnids: list[str], split: str, per_class: int = 2, form: str = "{wnid}_{index}.JPEG"
) -> Path:
    for label, index in every(split, len(wnids), per_class):
        put(top / wnids[label] / form.format(wnid=wnids[label], index=index), shade(label, index))
    return top


def in1k(root: Path, per_class: int = 2) -> Path:
    """Train and val of four classes. The numbers of val's images run against their classes."""
    class_folders(root / "imagenet/train", WNIDS, "train", per_class)
    for label, index in every("val", 4, per_class):
        number = (index - STEP["val"]) * 4 + 4 - label
        put(root / f"imagenet/val/{WNIDS[label]}/ILSVRC2012_val_{number:08d}.JPEG", shade(label, index))
    return root / "imagenet"


def in_real(root: Path, lists: list[list[int]]) -> Path:
    path = root / "real.json"
    path.write_text(json.dumps(lists))
    return path


def in_sketch(root: Path, per_class: int = 2) -> Path:
    return class_folders(root / "sketch", WNIDS, "test", per_class, "sketch_{index}.JPEG")


def in_a(root: Path, per_class: int = 2) -> Path:
    top = class_folders(root / "imagenet-a", WNIDS[1:3], "test", per_class, "0.01_fox _ fox_{index}.jpg")
    text(top / "README.txt", ["n01443537 goldfish"])
    return top


def in_r(root: Path, per_class: int = 2) -> Path:
    return class_folders(root / "imagenet-r", [WNIDS[0], WNIDS[3]], "test", per_class, "art_{index}.jpg")


def in_v2(root: Path, numbers: tuple[int, ...] = (0, 1, 2, 3, 10), per_class: int = 1) -> Path:
    """Class numbers as folders; the grey of an image is 10 + 10 * its class + its index."""
    top = root / "imagenetv2-matched-frequency-format-val"
    for number in numbers:
        for index in range(per_class):
            put(top / f"{number}/{index:040x}.jpeg", 10 + 10 * number + index)
    return top


def in_c(root: Path, corruptions: dict[str, str], severities: tuple[int, ...] = (1, 2, 3, 4, 5)) -> Path:
    """corruptions: the group folder of each ("" for none). The grey is the class's, plus the severity."""
    top = root / "imagenet-c"
    for corruption, group in corruptions.items():
        for severity in severities:
            for label, wnid in enumerate(WNIDS):
                path = top / group / corruption / str(severity) / wnid / "ILSVRC2012_val_00000001.JPEG"
                put(path, shade(label, severity))
    return top


def ade20k(root: Path, count: int = 3, size: tuple[int, int] = (12, 8)) -> Path:
    """Mask i: 0 on the left column, 150 in the last row, else class i + 1. `size` is (width, height)."""
    top = root / "ADEChallengeData2016"
    for folder, name in (("training", "train"), ("validation", "val")):
        for number in range(count):
            stem = f"ADE_{name}_{number + 1:08d}"
            put(top / f"images/{folder}/{stem}.jpg", 50 + number)
            Image.new("RGB", size, (50 + number,) * 3).save(top / f"images/{folder}/{stem}.jpg", quality=95)
            mask = np.full(size[::-1], number + 1, dtype=np.uint8)
            mask[:, 0], mask[-1, 1:] = 0, 150
            path = top / f"annotations/{folder}/{stem}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(path)
    rows = [f"{number}\t0.1\t11664\t1172\t{number % 2}\tthing {number}, stuff" for number in range(1, 151)]
    text(top / "objectInfo150.txt", ["Idx\tRatio\tTrain\tVal\tStuff\tName", *rows])
    return top


def depth_png(path: Path, millimetres: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(millimetres.astype(np.uint16)).save(path)
    return path


def nyu(root: Path, count: int = 3, size: tuple[int, int] = (12, 8)) -> Path:
    """BTS: image i is of grey 50 + i (80 + i of test) and 1.5 + i metres away; no reading in the top left corner."""
    top = root / "nyu_depth_v2"
    for split, base, slash in (("train", "sync", "/"), ("test", "official_splits/test", "")):
        lines = []
        for number in range(count):
            image, depth = f"bathroom_0001/rgb_{number:05d}.jpg", f"bathroom_0001/sync_depth_{number:05d}.png"
            put(top / base / image, 0)
            Image.new("RGB", size, (50 + 30 * (split == "test") + number,) * 3).save(top / base / image, quality=95)
            pixels = np.full(size[::-1], 1500 + 1000 * number)
            pixels[0, 0] = 0
            depth_png(top / base / depth, pixels)
            lines.append(f"{slash}{image} {slash}{depth} 518.8579")
        put(top / base / "bathroom_0001/rgb_09999.jpg", 99)
        text(top / f"nyu_{split}.txt", [*lines[:1], f"{slash}bathroom_0001/rgb_09999.jpg None 518.8579", *lines[1:]])
    return top


def nyu_mmseg(root: Path, count: int = 3, size: tuple[int, int] = (12, 8)) -> Path:
    """The layout of mmsegmentation, with the values of `nyu`."""
    top = root / "nyu_depth_v2"
    for split in ("train", "test"):
        for number in range(count):
            put(top / f"images/{split}/room_{number}.jpg", 0)
            grey = 50 + 30 * (split == "test") + number
            Image.new("RGB", size, (grey,) * 3).save(top / f"images/{split}/room_{number}.jpg", quality=95)
            pixels = np.full(size[::-1], 1500 + 1000 * number)
            pixels[0, 0] = 0
            depth_png(top / f"annotations/{split}/room_{number}.png", pixels)
    return top


def truncate(path: Path, share: float = 0.5) -> Path:
    """Cut a file short."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def gzip_of(path: Path, content: bytes) -> Path:
    with gzip.open(path, "wb") as file:
        file.write(content)
    return path
