import configparser
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parent.parent


def documents(*suffixes):
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


def test_every_accelerator_pins_the_same_jax():
  setup = configparser.ConfigParser()
  setup.read(ROOT / "setup.cfg")
  extras = setup["options.extras_require"]
  lists = ((ROOT / "requirements.txt").read_text(), extras["gpu"], extras["tpu"])
  cpu, gpu, tpu = (re.findall(r"^jax(?:\[\w+\])?([=>].*)", text, re.M) for text in lists)
  assert len(cpu) == 2 and cpu == gpu == tpu
