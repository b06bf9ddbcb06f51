"""Data sets that tests draw: OmniMedVQA's layout, split files, parquet and saved folders."""

import io
import json
import struct
import zlib

import ml_collections
import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
from PIL import Image

from kepo_jax.types import Example

RECORD = {
  "dataset": "Set A", "question_id": "Set A_0000", "question_type": "Anatomy Identification",
  "question": "Which organ is shown?", "gt_answer": "Brain", "image_path": "Images/Set A/test (1)/left.lower & x.png",
  "option_A": "Chest", "option_B": "Brain", "option_C": "Knee", "option_D": "Hand", "modality_type": "X-Ray",
}  # fmt: skip


class Layout:
  """A data set on disk in OmniMedVQA's layout."""

  def __init__(self, root):
    self.root = root
    (root / "QA_information" / "Open-access").mkdir(parents=True)
    self.image(RECORD["image_path"])

  def image(self, relative, grey=0):
    """Draws an image of one grey, from 0 to 255."""
    path = self.root / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (40, 40), grey).save(path, format="PNG")

  def write(self, *records, name="Set A"):
    path = self.root / "QA_information" / "Open-access" / f"{name}.json"
    path.write_text(json.dumps(list(records)))
    return path


def record(number=0, **changes):
  """RECORD with another id and some fields changed; None drops a field."""
  changed = RECORD | {"question_id": f"Set A_{number:04d}", "question": f"Which organ is shown? ({number})"} | changes
  return {key: value for key, value in changed.items() if value is not ...}


MEDR1 = {
  "image": "Images/Chest CT/a (1)/left.lower & x.png",
  "problem": "Which organ is shown? A)Chest, B)Brain (left), C)No, it's none",
  "solution": "<answer> B </answer>",
}
MEDVLM = {
  "image": ["images/a.png"], "problem": "Which organ?\nA) Chest\nB) Brain", "solution": "B",
  "question": "Which organ?", "options": ["Chest", "Brain"], "answer": "Brain", "subset": "X-Ray",
  "dataset": "OmniMedVQA",
}  # fmt: skip


def write_records(path, *records):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(list(records)))
  return path


IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def encoded(number=0, kind="PNG"):
  stream = io.BytesIO()
  Image.fromarray(np.full((8, 10 + number, 3), 20 * number % 256, np.uint8)).save(stream, format=kind)
  return stream.getvalue()


def rows(count=3, **changes):
  """Columns as the library writes them; a changed column may be a value for all rows or a list."""
  columns = {
    "image": [{"bytes": encoded(i), "path": None} for i in range(count)],
    "problem": [f"What is number {i}?\nA: a brain\nB: a chest, (or two)" for i in range(count)],
    "solution": ["<answer> B </answer>"] * count,
  }
  return columns | {key: value if isinstance(value, list) else [value] * count for key, value in changes.items()}


def table(columns):
  """Arrow table with the `Image` type for dicts."""
  kinds = {key: IMAGE if isinstance(next(iter(column), None), dict) else None for key, column in columns.items()}
  return pa.table({key: pa.array(column, type=kinds[key]) for key, column in columns.items()})


def write_parquet(path, **changes):
  path.parent.mkdir(parents=True, exist_ok=True)
  pa.parquet.write_table(table(rows(**changes)), path)
  return path


def write_saved(folder, *, shards=1, **changes):
  folder.mkdir(parents=True, exist_ok=True)
  names = [f"data-{i:05d}-of-{shards:05d}.arrow" for i in range(shards)]
  whole = table(rows(**changes))
  size = -(-whole.num_rows // shards)
  for i, name in enumerate(names):
    with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, whole.schema) as writer:
      writer.write_table(whole.slice(i * size, size), max_chunksize=2)
  (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
  (folder / "dataset_info.json").write_text("{}")
  return folder


def bomb(side):
  """A small PNG whose header says side x side pixels."""
  data = encoded()
  header = data[12:16] + struct.pack(">II", side, side) + data[24:29]
  return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def question(modality, number, image, *more):
  """A question about an image of its modality, given by number, and more of them by path."""
  texts = {"question": "?", "options": ("a", "b"), "answer": "A", "modality": modality, "dataset": modality}
  return Example(id=f"{modality}/{number:04d}", images=(f"/{modality}/{image}.png", *more), **texts)


def settings(directory, **changes):
  """What a config says of its data: few questions of a folder."""
  values = {"directory": str(directory), "split_files": "", "lenient": False, "train_modality": "MRI", "split_seed": 0}
  return ml_collections.ConfigDict(values | {"train_items": 6, "validation_items": 2, "test_items": 3} | changes)
