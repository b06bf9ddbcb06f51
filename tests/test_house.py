"""The rules of the house that a program can check: layers, configs, forbidden constructs, docs."""

import ast
import importlib.util
import pathlib
import re
from collections.abc import Iterator

import ml_collections
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "kepo_jax"
CONFIGS = ROOT / "experiments" / "configs"

# A room imports only from itself and from rooms before it.
LAYERS = (
  "types", "sharding", "objectives", "models", "data", "sampling", "rewards", "exploration", "evaluation",
  "training", "reporting", "planning",
)  # fmt: skip
# What a room must not know although the order of the rooms would let it, or although it comes from outside.
FORBIDDEN = {
  "objectives": ("kepo_jax.sharding", "ml_collections", "optax"),
  "models": ("optax",),
  "exploration": ("optax",),
  "evaluation": ("optax",),
  "training": ("argparse", "absl.app", "absl.flags"),
  "reporting": ("kepo_jax.training",),
}
EVERYWHERE_FORBIDDEN = ("experiments", "tests", "torch", "torchvision", "trl", "pickle", "dill", "cloudpickle")


def sources(*folders: pathlib.Path) -> list[pathlib.Path]:
  """Python files of some folders, sorted."""
  return sorted(path for folder in folders for path in folder.rglob("*.py"))


def relative(path: pathlib.Path) -> str:
  """A path as a message shows it."""
  return path.relative_to(ROOT).as_posix()


def imported_names(tree: ast.AST) -> Iterator[str]:
  """Full dotted names that a module imports."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def starts_with(name: str, prefixes: tuple[str, ...]) -> bool:
  """Whether a dotted name lies in one of some packages."""
  return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def import_faults(text: str, room: str) -> list[str]:
  """What is wrong with the imports of one library module of a room."""
  faults = []
  for name in imported_names(ast.parse(text)):
    parts = name.split(".")
    if name.startswith("."):
      faults.append(f"relative import {name}")
    elif starts_with(name, EVERYWHERE_FORBIDDEN + FORBIDDEN.get(room, ())):
      faults.append(f"{room} must not know {name}")
    elif parts[0] == "kepo_jax" and len(parts) > 1 and parts[1] in LAYERS:
      if LAYERS.index(parts[1]) > LAYERS.index(room):
        faults.append(f"{room} stands before {parts[1]} and imports {name}")
  return faults


@pytest.mark.parametrize("path", sources(LIBRARY), ids=relative)
def test_imports_point_downwards(path):
  room = path.relative_to(LIBRARY).with_suffix("").parts[0]
  if room == "__init__":
    room = LAYERS[-1]
  assert room in LAYERS, f"{relative(path)} lies in no room of DESIGN: {', '.join(LAYERS)}"
  assert import_faults(path.read_text(), room) == [], relative(path)


@pytest.mark.parametrize(
  ("room", "text"),
  [
    ("models", "from kepo_jax import data"),
    ("models", "import kepo_jax.rewards"),
    ("objectives", "from kepo_jax.models.qwen3_vl import model"),
    ("data", "def f():\n  from kepo_jax.training import loop"),
    ("reporting", "from kepo_jax import training"),
    ("types", "from . import sharding"),
    ("planning", "from experiments import kepo_medvqa"),
    ("models", "import torch.nn"),
    ("training", "from absl import flags"),
  ],
)
def test_an_upward_import_is_seen(room, text):
  assert import_faults(text, room)


def test_lower_imports_are_allowed():
  text = "from kepo_jax.objectives import losses\nimport kepo_jax.types\nfrom torchlike import x\nimport jax"
  assert import_faults(text, "models") == []


@pytest.mark.parametrize("path", sources(LIBRARY, ROOT / "experiments"), ids=relative)
def test_no_forbidden_construct(path):
  for node in ast.walk(ast.parse(path.read_text())):
    where = f"{relative(path)}:{getattr(node, 'lineno', 0)}"
    if isinstance(node, ast.Call):
      name = ast.unparse(node.func)
      assert name not in ("eval", "exec", "pickle.load", "pickle.loads", "torch.load"), f"{where}: {name}"
      assert not (name == "print" and LIBRARY in path.parents), f"{where}: print in the library, use logging or a sink"
      makes_mesh = name.split(".")[-1] in ("Mesh", "make_mesh", "create_device_mesh") and not name.startswith(
        "sharding"
      )
      assert not makes_mesh or path.name == "sharding.py", f"{where}: only sharding.py makes meshes"
      unsafe = any(keyword.arg == "allow_pickle" for keyword in node.keywords)
      assert not unsafe, f"{where}: allow_pickle"
    if isinstance(node, ast.ExceptHandler):
      broad = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
      assert not broad, f"{where}: broad except"


# ---- configs ----


def config_files() -> list[pathlib.Path]:
  """Every file of experiments/configs that is an experiment."""
  return [path for path in sources(CONFIGS) if path.name != "__init__.py"]


def load_config(path: pathlib.Path) -> ml_collections.ConfigDict:
  """The config of a file, loaded as `--config=FILE` loads it."""
  spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config()


def leaves(config: ml_collections.ConfigDict, prefix: str = "") -> Iterator[str]:
  """Dotted names of all fields of a config."""
  for name in config:
    value = config[name]
    if isinstance(value, ml_collections.ConfigDict):
      yield from leaves(value, f"{prefix}{name}.")
    else:
      yield f"{prefix}{name}"


def names_read(paths: list[pathlib.Path]) -> set[str]:
  """Names that some files read as attributes, or as strings where a file indexes a config: `config.optimizer[name]`."""
  names = set()
  for path in paths:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    if any(isinstance(node, ast.Subscript) and re.match(r"config\b", ast.unparse(node.value)) for node in nodes):
      names |= {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
  return names


@pytest.mark.parametrize("path", config_files(), ids=relative)
def test_config_loads_and_says_what_it_is(path):
  config = load_config(path)
  assert isinstance(config, ml_collections.ConfigDict)
  assert len(list(leaves(config))) > 0
  function = next(x for x in ast.parse(path.read_text()).body if getattr(x, "name", "") == "get_config")
  assert ast.get_docstring(function) or ast.get_docstring(ast.parse(path.read_text())), "say what the experiment is"


def test_every_config_field_is_read():
  read = names_read([path for path in sources(LIBRARY, ROOT / "experiments") if CONFIGS not in path.parents])
  unread = {f"{path.stem}: {leaf}" for path in config_files() for leaf in leaves(load_config(path))
            if leaf.split(".")[-1] not in read}  # fmt: skip
  assert unread == set()


def test_an_unread_field_is_seen(tmp_path):
  path = tmp_path / "module.py"
  path.write_text("x = config.train.learning_rate\nconfig.train.unread = 1\n")
  config = ml_collections.ConfigDict({"train": {"learning_rate": 1.0, "unread": 2}})
  assert [leaf for leaf in leaves(config) if leaf.split(".")[-1] not in names_read([path])] == ["train.unread"]


# ---- docs and packaging ----

MACHINE_PATH = re.compile(r"(?<![\w.])/(?:root|home|tmp|work|Users|opt|mnt)/[\w.]")


def documents() -> list[pathlib.Path]:
  """Everything that a user reads."""
  return sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.txt"), ROOT / "Makefile"])


@pytest.mark.parametrize("path", documents(), ids=relative)
def test_documents_name_no_machine_path(path):
  assert MACHINE_PATH.findall(path.read_text()) == []


@pytest.mark.parametrize("path", [path for path in documents() if path.suffix == ".md"], ids=relative)
def test_links_between_documents_exist(path):
  for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text()):
    if "://" not in target:
      assert (path.parent / target).exists(), f"{relative(path)} links to {target}"


@pytest.mark.parametrize("path", sources(LIBRARY, ROOT / "experiments", ROOT / "tests"), ids=relative)
def test_sources_name_no_machine_path(path):
  if path != pathlib.Path(__file__):
    assert MACHINE_PATH.findall(path.read_text()) == []


def test_accelerator_requirements_pin_the_same_jax():
  pins = dict.fromkeys(("requirements.txt", "requirements-tpu.txt", "requirements-gpu.txt"))
  for name in pins:
    lines = (ROOT / name).read_text().splitlines()
    pins[name] = [re.sub(r"\[\w+\]", "", line) for line in lines if re.match(r"jax[\[=>]", line)]
  assert len(pins["requirements.txt"]) == 2
  assert pins["requirements-tpu.txt"] == pins["requirements-gpu.txt"] == pins["requirements.txt"]


def test_markers_are_declared():
  assert {"slow", "parity"} <= set(re.findall(r"^  (\w+): ", (ROOT / "setup.cfg").read_text(), re.M))


def test_every_metric_is_defined():
  family = "reward|hint|gate|divergence|ratio|kl|sampler|completion|injected|validation|dead_group_rate|compiled"
  named = re.compile(rf'f?"((?:{family})/[a-z_{{}}@]+)')
  text = (ROOT / "docs" / "metrics.md").read_text()
  found = {name for path in sources(LIBRARY) for name in named.findall(path.read_text())}
  assert len(found) > 25
  # An f-string is defined by what stands before its first brace.
  assert [name for name in sorted(found) if name.split("{")[0].rstrip("@") not in text] == []
