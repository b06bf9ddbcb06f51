"""Code in a model or checkpoint folder is not run; and the watch of the network, under which the README trains."""

import json
import os
import pathlib
import pickle
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from kepo_jax import sharding
from kepo_jax.data import prompts, tokenization
from kepo_jax.data.pipeline import Processor
from kepo_jax.models.qwen3_vl import conversion
from kepo_jax.training import checkpoints
from tests.conftest import ROOT
from tests.training.runs import ASSETS

# ---- the network ----

# Audit events are raised inside the interpreter's own socket module, whoever calls it and whatever it catches.
WATCHED = """
import sys
reached = []
def watch(event, args):
  if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.sendmsg"):
    reached.append(f"{event} {args[1:] if event == 'socket.connect' else args}")
    raise OSError(f"the network is watched: {reached[-1]}")
sys.addaudithook(watch)
"""
REPORT = """
print("reached", reached)
"""
# What a library would do: it asks, and goes on without an answer.
ATTEMPTS = """
import contextlib, socket
import huggingface_hub
with contextlib.suppress(OSError):
  socket.create_connection(("127.0.0.1", 9), timeout=1)
with contextlib.suppress(Exception):
  huggingface_hub.model_info("gpt2")
"""


def reached(program: str, *arguments) -> str:
  """What a program that may use the network says it tried to reach."""
  offline = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
  environment = {name: value for name, value in os.environ.items() if name not in offline}
  command = [sys.executable, "-c", WATCHED + program + REPORT, *map(str, arguments)]
  found = subprocess.run(
    command, cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
  )
  assert found.returncode == 0, found.stderr[-3000:]
  return found.stdout.splitlines()[-1]


def test_an_attempt_is_seen():
  said = reached(ATTEMPTS)
  assert "socket.getaddrinfo ('127.0.0.1', 9" in said and "socket.getaddrinfo ('huggingface.co'" in said


# ---- code and pickles in a folder ----

PLANT = """
import pathlib
pathlib.Path({marker!r}).write_text("ran")
from transformers import PreTrainedTokenizerFast
class EvilTokenizer(PreTrainedTokenizerFast):
  pass
"""
ESCAPES = (
  "{{ ''.__class__.__base__.__subclasses__() }}",
  "{{ messages.append(1) }}",
  "{% include 'tokenizer.json' %}",
)


class Bomb:
  """Writes the marker when it is unpickled."""

  def __init__(self, marker: pathlib.Path):
    self.marker = marker

  def __reduce__(self):
    return pathlib.Path.touch, (self.marker,)


def change(path: pathlib.Path, **fields) -> None:
  """Sets fields of a JSON file."""
  path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | fields))


@pytest.fixture
def marker(tmp_path):
  """The file that planted code writes."""
  return tmp_path / "ran"


@pytest.fixture
def folder(tmp_path, marker, monkeypatch):
  """A phantom model with every kind of code beside its files, named by every file that can name code."""
  monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
  monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
  root = shutil.copytree(ASSETS / "confused", tmp_path / "model")
  for name in ("evil", "__init__", "tokenization_evil", "modeling_evil", "conftest"):
    (root / f"{name}.py").write_text(PLANT.format(marker=str(marker)))
  for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "tokenizer.pkl"):
    (root / name).write_bytes(pickle.dumps(Bomb(marker)))
  models = ("AutoConfig", "AutoModel", "AutoModelForImageTextToText")
  change(root / "config.json", auto_map={name: "evil.EvilTokenizer" for name in models})
  change(root / "preprocessor_config.json", auto_map={"AutoImageProcessor": "evil.EvilTokenizer"})
  change(root / "processor_config.json", auto_map={"AutoProcessor": "evil.EvilTokenizer"})
  return root


def name_tokenizer(folder: pathlib.Path, name: str = "evil.EvilTokenizer") -> None:
  """Makes the tokenizer files name a class of the folder, or of a repository of the Hub."""
  auto_map = {"AutoTokenizer": [None, name]}
  change(folder / "tokenizer_config.json", tokenizer_class="EvilTokenizer", auto_map=auto_map)


def load(folder: pathlib.Path) -> None:
  """All that a run reads of a model folder."""
  Processor.from_directory(folder, templates=prompts.TEMPLATES["brief"])
  conversion.load_pretrained(folder)


def test_code_and_pickles_of_a_model_folder_are_ignored(folder, marker, tmp_path):
  load(folder)
  assert not marker.exists()
  config, params = conversion.load_pretrained(folder)
  conversion.save_pretrained(tmp_path / "export", config, params, source=folder)
  suffixes = {path.suffix for path in (tmp_path / "export").iterdir()}
  assert suffixes <= {".json", ".jinja", ".md", ".safetensors", ".txt"}
  assert not marker.exists()


def test_a_tokenizer_class_of_the_folder_s_own_is_ignored(folder, marker):
  text = "Which finding does the image show? <think>"
  genuine = tokenization.load(ASSETS / "confused")(text)["input_ids"]
  change(folder / "tokenizer_config.json", tokenizer_class="evil.EvilTokenizer")
  load(folder)  # tokenizer.json says all that is needed
  assert not marker.exists()
  for name in ("evil.EvilTokenizer", "someone/evil--evil.EvilTokenizer"):
    name_tokenizer(folder, name)
    load(folder)
    assert not marker.exists(), name
    assert tokenization.load(folder)(text)["input_ids"] == genuine


def test_pickled_weights_are_refused(folder, marker):
  (folder / "model.safetensors").unlink()
  with pytest.raises(ValueError, match="only safetensors weights are read"):
    load(folder)
  (folder / "model.safetensors").write_bytes((folder / "pytorch_model.bin").read_bytes())
  with pytest.raises(ValueError, match="truncated or not a safetensors file"):
    load(folder)
  assert not marker.exists()


def test_a_chat_template_cannot_leave_its_sandbox(folder):
  for template in ESCAPES:
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match="chat template"):
      load(folder)


def test_code_and_pickles_of_a_checkpoint_are_ignored(tmp_path, marker):
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  state = {"params": {"w": jax.device_put(np.arange(8, dtype=np.float32), sharding.replicated(mesh))}}
  store = checkpoints.Checkpoints(tmp_path / "checkpoints", every=1, minutes=0.0, keep=1)
  store.save(1, state, {"step": 1})
  store.close()
  root = tmp_path / "checkpoints" / "1"
  for place in (tmp_path / "checkpoints", root, root / "state"):
    (place / "__init__.py").write_text(PLANT.format(marker=str(marker)))
    (place / "state.pkl").write_bytes(pickle.dumps(Bomb(marker)))
  like = {"w": jax.ShapeDtypeStruct((8,), np.float32, sharding=sharding.replicated(mesh))}
  assert checkpoints.restored_params(root, like)["w"].sum() == 28
  again = checkpoints.Checkpoints(tmp_path / "checkpoints", every=1, minutes=0.0, keep=1)
  found, record = again.restore(state)
  again.close()
  assert found["params"]["w"].sum() == 28 and record == {"step": 1}
  assert not marker.exists()


# ---- the audit ----

PIP_AUDIT = """#!/bin/sh
echo '{said}'
exit {code}
"""


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
@pytest.mark.parametrize(
  ("said", "code", "shown", "clean"),
  [
    ("No known vulnerabilities found", 0, "No known vulnerabilities found", True),
    ("Found 2 known vulnerabilities in 1 package", 1, "Found 2 known", False),
    ("ERROR:pip_audit._cli:jax: Dependency not found on PyPI", 1, "make audit: nothing was audited", False),
  ],
)
def test_an_audit_that_could_not_ask_is_not_clean(tmp_path, said, code, shown, clean):
  for name, text in {"venv/bin/python": "#!/bin/sh\n", "venv-audit/bin/pip-audit": PIP_AUDIT}.items():
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    path.write_text(text.format(said=said, code=code))
    path.chmod(0o755)
  venv, stamps = tmp_path / "venv", ("venv/.runtime", "venv-audit/.ready")
  old = [argument for name in stamps for argument in ("-o", str(tmp_path / name))]
  for name in stamps:
    (tmp_path / name).touch()
  command = ["make", *old, "audit", f"VENV={venv}"]
  found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
  assert (found.returncode == 0) == clean
  assert shown in found.stdout + found.stderr
