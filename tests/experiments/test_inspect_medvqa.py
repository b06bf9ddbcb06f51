import json
import os
import shutil

import pytest
from absl.testing import flagsaver
from PIL import Image

from experiments import environment
from tests import fake_bucket
from tests.data import cases


@pytest.fixture
def download(tmp_path):
  """A root with three questions about two images, one with an odd modality."""
  layout = cases.Layout(tmp_path / "OmniMedVQA")
  (layout.root / "Images" / "b.JPG").parent.mkdir(exist_ok=True)
  Image.new("RGB", (60, 30)).save(layout.root / "Images" / "b.JPG", format="JPEG")
  record = cases.record
  two = {"option_C": ..., "option_D": ..., "modality_type": "CT(Computed Tomography)"}
  layout.write(record(0), record(1, gt_answer="chest."), record(2, image_path="Images/b.JPG", **two))
  return layout.root


def test_a_bucket(inspect_medvqa, download, tmp_path, capsys, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  shutil.copytree(download, tmp_path / "cloud" / "bucket" / "download")
  with fake_bucket.served(tmp_path / "cloud"):
    inspect_medvqa.main(["", "gs://bucket/download"])
  captured = capsys.readouterr()
  for text in (
    "gs://bucket/download: OmniMedVQA layout, 1 files, 3 records, 3 kept, 0 dropped",
    "2 images, 1 of them with",
  ):
    assert text in captured.out
  assert "copying, bytes: " in captured.err


def test_json(inspect_medvqa, download, capsys):
  os.rename(download / "QA_information" / "Open-access", download / "QA_information" / "Mine")
  os.rename(download / "Images", download.parent / "Images")
  with flagsaver.flagsaver(json=True, decode=True, access="Mine", images_root=str(download.parent)):
    inspect_medvqa.main(["", str(download), str(download)])
  captured = capsys.readouterr()
  result = json.loads(captured.out)
  assert result["usable"] and len(result["reports"]) == 2 and "images: 2/2" in captured.err
  report = result["reports"][0]
  assert report["summary"]["rules"] == {"answer_normalised": 1, "modality_spelling": 1}
  assert report["figures"]["overall"]["chance"] == (0.25 + 0.25 + 0.5) / 3
  assert report["figures"]["modalities"]["CT"]["letters"] == {"B": 1}
  assert report["images"]["formats"] == {"JPEG": 1, "PNG": 1} and report["images"]["sizes"] == {"40x40": 1, "60x30": 1}
  assert result["overlaps"] == [{"first": str(download), "second": str(download), "images": 2, "share": 1.0}]


def test_unreadable_images(inspect_medvqa, download, capsys):
  path = download / "Images" / "b.JPG"
  whole = path.read_bytes()
  path.write_bytes(whole[: len(whole) - 10])  # the header is there
  inspect_medvqa.main(["", str(download)])
  with flagsaver.flagsaver(decode=True):
    with pytest.raises(ValueError, match=r"question Set A/Set A_0002: image .*b\.JPG.*1 unreadable_image"):
      inspect_medvqa.main(["", str(download)])
    capsys.readouterr()
    with flagsaver.flagsaver(lenient=True, json=True):
      inspect_medvqa.main(["", str(download)])
  report = json.loads(capsys.readouterr().out)["reports"][0]
  assert (report["summary"]["kept"], report["summary"]["dropped"]) == (2, 1)
  assert [os.path.basename(name) for name in report["images"]["unreadable"]] == ["b.JPG"]
  path.unlink()
  with flagsaver.flagsaver(images=False):
    inspect_medvqa.main(["", str(download)])
  printed = capsys.readouterr().out
  assert "images: not opened (--noimages)" in printed and "2 images" not in printed and "formats" not in printed


def test_an_error_is_one_line_and_the_exit_status(inspect_medvqa, download, capsys):
  (download / "Images" / "b.JPG").unlink()
  with flagsaver.flagsaver(json=True), pytest.raises(SystemExit) as ended:  # Python prints a text and exits with 1
    environment.reporting_errors(inspect_medvqa.main, arguments=True)(["", str(download)])
  line = str(ended.value.code)
  assert line.startswith("error: ") and "record 2 'Set A_0002'" in line and "\n" not in line
  told = json.loads(capsys.readouterr().out)
  assert not told["usable"] and "1 missing_image" in told["error"]
