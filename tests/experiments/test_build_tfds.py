import pytest
from absl.testing import flagsaver

from tests.data.cases import Layout, record


@pytest.fixture
def download(tmp_path):
  layout = Layout(tmp_path / "OmniMedVQA")
  names = [f"Images/{number}.png" for number in range(6)]
  for number, name in enumerate(names):
    layout.image(name, number)
  layout.write(*(record(number, image_path=name, modality_type="MRI") for number, name in enumerate(names)))
  return layout.root


def test_from_flags_to_a_folder(build_tfds, download, tmp_path, capsys):
  numbers = {"train_items": 3, "validation_items": 1, "test_items": 2, "split_seed": 5}
  with flagsaver.flagsaver(data_dir=str(tmp_path / "data"), manual_dir=str(download), **numbers):
    build_tfds.main([])
    printed = capsys.readouterr()
    folder = tmp_path / "data" / "omnimedvqa" / "omnimedvqa-MRI-3-1-2-5" / "1.0.0"
    assert printed.out.startswith(f"wrote {folder}: train 3, validation 1, test 2 questions")
    assert "writing questions: 6/6" in printed.err
    build_tfds.main([])
    assert capsys.readouterr().out.startswith(f"reused {folder}: train 3")


def test_another_folder_other_images_and_damage(build_tfds, download, tmp_path, capsys):
  (download / "QA_information" / "Open-access").rename(download / "QA_information" / "Mine")
  (download / "Images").rename(tmp_path / "Images")
  picture = tmp_path / "Images" / "0.png"
  picture.write_bytes(picture.read_bytes()[:40])
  common = {"data_dir": str(tmp_path / "data"), "manual_dir": str(download), "train_items": 3, "test_items": 1}
  common |= {"validation_items": 1, "access": "Mine", "images_root": str(tmp_path)}
  for changes, message in [
    ({"images_root": None}, "missing_image"),
    ({"access": "Open-access"}, "Open-access: no JSON files"),
    ({}, r"0\.png"),
  ]:
    with flagsaver.flagsaver(**common | changes), pytest.raises(ValueError, match=message):
      build_tfds.main([])
  with flagsaver.flagsaver(**common, lenient=True):
    build_tfds.main([])
  # Five questions are wanted and five images can be read.
  name = "omnimedvqa-MRI-3-1-1-0-Mine-lenient"
  assert f"{name}/1.0.0: train 3, validation 1, test 1 questions" in capsys.readouterr().out
