"""Writes records as many and as large as OmniMedVQA's, and reads them: `python -m tests.data.real_size FOLDER`.

The numbers are those of the open-access part: 42 files, RadImageNet holding two thirds, real spellings of modalities,
paths with spaces and brackets, two to four options of real length. There are no images.
"""

import json
import pathlib
import random
import sys
import time

FILES = 42
RECORDS = 89_000
MODALITIES = (
  ("MR (Mag-netic Resonance Imaging)", 36), ("CT(Computed Tomography)", 18), ("ultrasound", 12), ("X-Ray", 9),
  ("Dermoscopy", 8), ("Microscopy Images", 6), ("Fundus Photography", 6), ("OCT (Optical Coherence Tomography", 5),
)  # fmt: skip
WORDS = ("soft", "tissue", "edema", "of", "the", "left", "lung", "(RD)", "No,", "normal.", "fracture", "carcinoma")
KINDS = ("Disease Diagnosis",) * 5 + ("Anatomy Identification", "Modality Recognition")


def write(root: pathlib.Path, seed: int = 0) -> int:
  """Writes the data set's question files; gives the number of records."""
  rng = random.Random(seed)
  folder = root / "OmniMedVQA" / "QA_information" / "Open-access"
  folder.mkdir(parents=True)
  first = RECORDS * 64 // 100  # RadImageNet
  sizes = [first, *[(RECORDS - first) // (FILES - 1)] * (FILES - 2)]
  sizes.append(RECORDS - sum(sizes))
  spellings, weights = zip(*MODALITIES, strict=True)
  for number, size in enumerate(sizes):
    name = "RadImageNet" if number == 0 else f"Set {number} (X & Y) v1.{number}"
    records = []
    for i in range(size):
      options = [f"{' '.join(rng.choices(WORDS, k=rng.randint(1, 8)))} {j}" for j in range(rng.choice((2, 4, 4, 4)))]
      record = {"dataset": name, "question_id": f"{name}_{i:04d}", "question_type": rng.choice(KINDS)}
      record |= {"question": f"What can be observed in this image of series {i % 3000}?", "gt_answer": options[i % 2]}
      record["image_path"] = f"Images/{name}/test/left.lower.lobe_T{i % 40}_N0/0001 ({i * 12 // 13}).png"
      record |= {f"option_{'ABCD'[j]}": option for j, option in enumerate(options)}
      records.append(record | {"modality_type": rng.choices(spellings, weights)[0]})
    (folder / f"{name}.json").write_text(json.dumps(records, indent=2))
  return sum(sizes)


def main(folder: str) -> None:
  """Reads and cuts; prints seconds, peak memory in bytes and numbers as JSON."""
  from kepo_jax.data import dealing, omnimedvqa
  from kepo_jax.planning import resident

  before, start = resident.peak_resident_bytes(), time.perf_counter()
  examples, summary = omnimedvqa.read(folder, check_images=False)
  read, peak = time.perf_counter() - start, resident.peak_resident_bytes()
  split = dealing.split_by_modality(examples)
  figures = {"kept": len(examples), "records": summary.records, "files": summary.files, "read_s": read}
  figures |= {"cut_s": time.perf_counter() - start - read, "peak_bytes": peak, "before_bytes": before}
  json.dump(figures | {"parts": {name: len(ids) for name, ids in split.ids.items()}}, sys.stdout)


if __name__ == "__main__":
  main(sys.argv[1])
