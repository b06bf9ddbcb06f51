"""As many records as OmniMedVQA has: indexed in seconds, in less memory than a checkpoint."""

import json
import random
import time

import pytest

from kepo_jax import memory
from kepo_jax.config import DataConfig
from kepo_jax.data import splits
from kepo_jax.data.phantom import build
from kepo_jax.data.readers import omnimedvqa
from tests.data.cases import record

FILES, RECORDS = 42, 89_000  # of the open-access part; RadImageNet holds two thirds
WORDS = ("soft", "tissue", "edema", "of", "the", "left", "lung", "(RD)", "No,", "normal.", "fracture", "carcinoma")


def write(folder, name, count, draw):
  """A file of records with texts and paths of real length; there are no images."""
  records = []
  for i in range(count):
    options = [f"{' '.join(draw.choices(WORDS, k=draw.randint(1, 8)))} {j}" for j in range(draw.choice((2, 4, 4, 4)))]
    lettered = dict.fromkeys(("option_A", "option_B", "option_C", "option_D"), ...)
    lettered |= {f"option_{'ABCD'[j]}": option for j, option in enumerate(options)}
    path = f"Images/{name}/test/left.lower.lobe_T{i % 40}_N0/0001 ({i * 12 // 13}).png"
    modality = draw.choice([*build.SPELLINGS.values()])
    texts = {"question": f"What can be observed in this image of series {i % 3000}?", "gt_answer": options[i % 2]}
    records.append(record(i, dataset=name, image_path=path, modality_type=modality, **texts, **lettered))
  (folder / f"{name}.json").write_text(json.dumps(records, indent=2))


@pytest.mark.slow
def test_89000_records(tmp_path):
  folder = tmp_path / "OmniMedVQA" / "QA_information" / "Open-access"
  folder.mkdir(parents=True)
  rest, draw = RECORDS - 800 * (FILES - 1), random.Random(0)
  for number in range(FILES):
    write(folder, f"Set {number} (X & Y) v1.{number}", 800 if number else rest, draw)
  before, start = memory.peak_resident_bytes(), time.process_time()
  examples, summary = omnimedvqa.read(tmp_path, check_images=False)
  parts = splits.split_by_modality(examples, DataConfig())
  seconds, grown = time.process_time() - start, memory.peak_resident_bytes() - before
  assert (summary.files, summary.records, summary.kept) == (FILES, RECORDS, RECORDS)
  assert {name: len(part) for name, part in parts.items()} == {"train": 600, "validation": 320, "test": 2400}
  assert seconds < 60 and grown < 7e8, (seconds, grown)  # 6 s when nothing else runs
