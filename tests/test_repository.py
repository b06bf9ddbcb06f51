"""Documents and requirements agree with what is in the repository."""

import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parent.parent


def documents(*suffixes):
  """What a user reads."""
  folders = (ROOT.glob("*"), (ROOT / "docs").rglob("*"))
  return sorted(path for paths in folders for path in paths if path.suffix in suffixes)


def test_links_between_documents_exist():
  links = [(path, link) for path in documents(".md") for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text())]
  assert len(links) > 20
  assert [(path.name, link) for path, link in links if "://" not in link and not (path.parent / link).exists()] == []


def test_documents_name_no_path_of_a_machine():
  path_of_a_machine = re.compile(r"(?<![\w.])/(?:root|home|tmp|work|Users|opt|mnt)/[\w.]")
  texts = {path.name: path.read_text() for path in [*documents(".md", ".txt"), ROOT / "Makefile"]}
  assert {name: found for name, text in texts.items() if (found := path_of_a_machine.findall(text))} == {}


def test_requirements_of_all_accelerators_pin_the_same_jax():
  pins = {}
  for name in ("requirements.txt", "requirements-tpu.txt", "requirements-gpu.txt"):
    lines = (ROOT / name).read_text().splitlines()
    pins[name] = [re.sub(r"\[\w+\]", "", line) for line in lines if re.match(r"jax[\[=>]", line)]
  assert len(pins["requirements.txt"]) == 2
  assert pins["requirements-tpu.txt"] == pins["requirements-gpu.txt"] == pins["requirements.txt"]
