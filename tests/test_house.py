"""The rules of the house that a program can check: layers, configs, forbidden constructs, docs."""

import ast
import importlib.util
import pathlib
import re
from collections.abc import Iterator

import ml_collections
import pytest

from tests import config_reads

ROOT = pathlib.Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "kepo_jax"
CONFIGS = ROOT / "experiments" / "configs"

# A room imports only from itself and from rooms before it.
LAYERS = (
  "types", "storage", "links", "sharding", "processes", "objectives", "models", "data", "sampling", "rewards",
  "exploration", "evaluation", "training", "reporting", "planning",
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
# What they read can run code.
UNSAFE_MODULES = ("pickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
EVERYWHERE_FORBIDDEN = ("experiments", "tests", "torch", "torchvision", "trl", *UNSAFE_MODULES)
# Calls that run what they are given, or what lies in the file that they are given.
UNSAFE_CALLS = {
  "eval", "exec", "torch.load", "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "os.system",
  "os.popen", *(f"{module}.{name}" for module in UNSAFE_MODULES for name in ("load", "loads", "open", "Unpickler")),
}  # fmt: skip
UNSAFE_OPTIONS = ("allow_pickle", "trust_remote_code", "shell")  # only ever passed as a literal False


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


def unsafe(text: str) -> list[str]:
  """What of a module can run code that it reads."""
  tree = ast.parse(text)
  found = [name for name in imported_names(tree) if starts_with(name, UNSAFE_MODULES)]
  for node in ast.walk(tree):
    if isinstance(node, ast.Call):
      name = ast.unparse(node.func)
      found += [name] if name in UNSAFE_CALLS else []
      found += ["allow_pickle"] if name in ("np.load", "numpy.load") and len(node.args) > 2 else []
      literal = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
      found += [option for option in UNSAFE_OPTIONS if literal.get(option, "False") != "False"]
    elif isinstance(node, ast.Dict):  # on its way to become options
      found += [key.value for key in node.keys if isinstance(key, ast.Constant) and key.value in UNSAFE_OPTIONS]
  return found


@pytest.mark.parametrize("path", sources(LIBRARY, ROOT / "experiments"), ids=relative)
def test_nothing_runs_what_it_reads(path):
  assert unsafe(path.read_text()) == [], relative(path)


@pytest.mark.parametrize(
  "text",
  [
    "eval('1')",
    "exec(text)",
    "import pickle",
    "from pickle import load",
    "import joblib as j",
    "from shelve import open as read",
    "import marshal",
    "pickle.loads(data)",
    "joblib.load(path)",
    "shelve.open(path)",
    "marshal.loads(data)",
    "torch.load(path)",
    "yaml.load(text, Loader=yaml.SafeLoader)",
    "yaml.unsafe_load(text)",
    "np.load(path, allow_pickle=True)",
    "np.load(path, None, True)",
    "numpy.load(path, allow_pickle=flag)",
    "subprocess.run(text, shell=True)",
    "subprocess.Popen(text, shell=flag)",
    "os.system(text)",
    "AutoTokenizer.from_pretrained(path, trust_remote_code=True)",
    "AutoTokenizer.from_pretrained(path, trust_remote_code=config.trust)",
    "AutoTokenizer.from_pretrained(path, **{'trust_remote_code': True})",
  ],
)
def test_what_would_run_is_seen(text):
  assert unsafe(text)


@pytest.mark.parametrize(
  "text",
  [
    "np.load(path)",
    "np.load(path, allow_pickle=False)",
    "json.loads(text)",
    "yaml.safe_load(text)",
    "subprocess.run(words)",
    "AutoTokenizer.from_pretrained(path, trust_remote_code=False)",
    "model.eval()",
  ],
)
def test_what_runs_nothing_is_allowed(text):
  assert unsafe(text) == []


@pytest.mark.parametrize("path", sources(LIBRARY, ROOT / "experiments"), ids=relative)
def test_no_forbidden_construct(path):
  for node in ast.walk(ast.parse(path.read_text())):
    where = f"{relative(path)}:{getattr(node, 'lineno', 0)}"
    if isinstance(node, ast.Call):
      name = ast.unparse(node.func)
      assert not (name == "print" and LIBRARY in path.parents), f"{where}: print in the library, use logging or a sink"
      makes_mesh = name.split(".")[-1] in ("Mesh", "make_mesh", "create_device_mesh") and not name.startswith(
        "sharding"
      )
      assert not makes_mesh or path.name == "sharding.py", f"{where}: only sharding.py makes meshes"
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


# Files whose reading of a field is no use of it in a run: they show, estimate, check or measure.
ONLOOKERS = (
  "reporting/panels.py", "reporting/run_page.py", "planning/memory.py", "planning/pods.py", "training/checks.py",
  "training/hints.py",
)  # fmt: skip


def users(*, without: str = "") -> list[tuple[str, str]]:
  """Modules of the library that act on the config: (name, text)."""
  named = {path.relative_to(LIBRARY).as_posix(): path for path in sources(LIBRARY)}
  left_out = {*ONLOOKERS, without}
  assert left_out - {""} <= set(named)
  return [(path.stem, path.read_text()) for name, path in named.items() if name not in left_out]


@pytest.mark.parametrize("path", config_files(), ids=relative)
def test_config_loads_and_says_what_it_is(path):
  config = load_config(path)
  assert isinstance(config, ml_collections.ConfigDict)
  assert len(list(leaves(config))) > 0
  function = next(x for x in ast.parse(path.read_text()).body if getattr(x, "name", "") == "get_config")
  assert ast.get_docstring(function) or ast.get_docstring(ast.parse(path.read_text())), "say what the experiment is"


def unread(config: ml_collections.ConfigDict, modules: list[tuple[str, str]]) -> set[str]:
  """Fields of a config that no module reads."""
  return set(leaves(config)) - config_reads.fields_read(modules)


@pytest.mark.parametrize("path", config_files(), ids=relative)
def test_every_config_field_is_read(path):
  assert unread(load_config(path), users()) == set()


def test_an_unread_field_is_seen():
  config = load_config(CONFIGS / "grpo.py")
  config.train.temperature = 1.0  # read in another section
  config.reward.split = 1.0  # a method of every string
  config.profile.clip_low = 0.1
  config.directory = ""
  assert unread(config, users()) == {"train.temperature", "reward.split", "profile.clip_low", "directory"}


def test_a_field_that_is_no_longer_read_is_seen():
  config = load_config(CONFIGS / "grpo.py")
  without_assembly = unread(config, users(without="training/assembly.py"))
  assert {"reward.format", "reward.more", "optimizer.b1", "eval.max_new_tokens"} <= without_assembly
  assert {"objective.importance_cap", "objective.supervised_weight"} <= without_assembly
  assert unread(config, users(without="training/setup.py")) >= {"data.train_items", "model.teacher"}
  assert unread(config, users(without="training/loop.py")) >= {"exploration.quoted_words", "supervised.source"}
  assert "checkpoint.keep" in unread(config, users(without="training/files.py"))


@pytest.mark.parametrize(
  ("body", "read"),
  [
    ("config.train.steps", {"train.steps"}),
    ("self._config.train.steps", {"train.steps"}),
    ("plan.config['train'].steps", {"train.steps"}),
    ("config.train.steps = 1", set()),
    ("other.train.steps", set()),
    ("'{}'.format(train.steps)", set()),
    ("train = run.config.train; train.steps", {"train.steps"}),
    ("c, x = run.config, 1; c.train.steps", {"train.steps"}),
    ("config = run.config.train; config.steps", {"train.steps"}),
    ("config = load(); config.train.steps", set()),
    ("[config.train[name] for name in ('steps', 'rate')]", {"train.steps", "train.rate"}),
    ("names = ('steps',); [config.train[name] for name in names]", {"train.steps"}),
    ("[config.train[name] for name in names]", set()),
    ("other.use(config.train)", {"train.rate"}),
    ("other.use(part=config.train)", {"train.rate"}),
    ("other.use(config.data)", {"data.rate"}),
    ("use(config.train)", set()),
  ],
)
def test_reads_are_recognised(body, read):
  modules = [("here", f"def f():\n  {body}\n"), ("other", "def use(part):\n  return part.rate\n")]
  assert {field for field in config_reads.fields_read(modules) if "." in field} == read


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
  family += "|supervised|dynamic|grad_norm"
  named = re.compile(rf'f?"((?:{family})/[a-z_{{}}@]+)')
  text = (ROOT / "docs" / "metrics.md").read_text()
  found = {name for path in sources(LIBRARY) for name in named.findall(path.read_text())}
  assert len(found) > 25
  # An f-string is defined by what stands before its first brace.
  assert [name for name in sorted(found) if name.split("{")[0].rstrip("@") not in text] == []
