"""Loads and saves checkpoints: Hugging Face folders to parameter trees and back, strictly and without a transpose.

The tree has the checkpoint's names and layout, so a leaf is one tensor, or one tensor per layer stacked. Loading
fills every device shard from the slices of the files it needs; saving streams one tensor at a time.
"""

import dataclasses
import functools
import json
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.sharding import Mesh, NamedSharding

from kepo_jax import multihost, sharding, storage
from kepo_jax.models.qwen3_vl import lora, model, safetensors_files, side_files
from kepo_jax.models.qwen3_vl.config import LoraConfig, Qwen3VLConfig, shown
from kepo_jax.models.qwen3_vl.layers import Params

_STACKS = ("blocks", "layers", "deepstack_merger_list")
_HEAD, _PREFIX = "lm_head.weight", "model."
_QUANTISED_NAMES = (".weight_scale", ".weight_scale_inv", ".qweight", ".qzeros", ".quant_state", ".weight_packed")
_QUANTISED_TYPES = ("F8", "F4", "F6", "I8", "U8", "I4", "U4")
_ORBAX = "params"  # subfolder of a converted checkpoint
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclasses.dataclass(frozen=True)
class _Leaf:
  """A leaf of the tree and the tensors it is made of."""

  names: tuple[str, ...]  # one per layer, or a single one
  stacked: bool
  shape: tuple[int, ...]  # of one tensor in the tree
  stored_shape: tuple[int, ...]  # of one tensor in the file


def _leaf(config: Qwen3VLConfig, path: tuple[str | int, ...], shape: tuple[int, ...]) -> _Leaf:
  stack = next((number for number, name in enumerate(path) if name in _STACKS), None)
  prefix: tuple[str | int, ...] = () if path[0] == "lm_head" else ("model",)
  if stack is not None and isinstance(path[stack + 1], int):  # unstacked layers
    stack = None
  if stack is None:
    names: tuple[str, ...] = (".".join(map(str, prefix + path)),)
  else:
    head, tail = prefix + path[: stack + 1], path[stack + 1 :]
    names = tuple(".".join(map(str, (*head, layer, *tail))) for layer in range(shape[0]))
    shape = shape[1:]
  stored_shape = shape
  if "patch_embed" in path and path[-1] == "weight":
    # The file holds a convolution kernel; flattened, it is the matrix of the patches as they arrive.
    tower = config.vision
    stored_shape = (shape[0], tower.in_channels, tower.temporal_patch_size, tower.patch_size, tower.patch_size)
  return _Leaf(names, stack is not None, shape, stored_shape)


def _leaves(config: Qwen3VLConfig, shapes: Any = None) -> dict[tuple[str | int, ...], _Leaf]:
  """Returns every leaf by its path, in the order of the tree; `shapes` are those of an unstacked tree."""
  flat = jax.tree_util.tree_leaves_with_path(model.abstract_params(config) if shapes is None else shapes)
  paths = {tuple(getattr(part, "key", getattr(part, "idx", "")) for part in path): leaf.shape for path, leaf in flat}
  return {path: _leaf(config, path, shape) for path, shape in paths.items()}


def resolved_folder(
  name: str | os.PathLike[str], *, progress: Callable[[int, int], None] | None = None
) -> pathlib.Path:
  """Returns the local folder of a checkpoint: `name` itself, `model/` in the folder of a run, or a copy in the cache.

  Args:
    name: a folder, a remote one such as gs://bucket/model, or a Hub id such as "org/name".
    progress: receives (bytes copied, bytes in all) of a remote folder that is not yet in the cache.

  Raises:
    ValueError: neither a folder nor a Hub id, or the Hub did not deliver.
    OSError: a remote folder cannot be read.
  """
  if storage.is_remote(name):
    return storage.staged(name, progress=progress)
  path = pathlib.Path(name).expanduser()
  if path.is_dir():
    return _exported(path) if (path / "questions.json").is_file() else path
  if not _HUB_NAME.fullmatch(str(name)):
    raise ValueError(f"{name} is no folder; give a Hugging Face folder of a Qwen3-VL, or a Hub id such as org/name")
  import huggingface_hub  # slow to import, and not needed for folders

  try:
    patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model", "LICENSE*"]
    return pathlib.Path(huggingface_hub.snapshot_download(str(name), allow_patterns=patterns))
  except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise ValueError(f"{name} is no folder, and the Hugging Face Hub did not deliver it: {reason}") from error


def _exported(run: pathlib.Path) -> pathlib.Path:
  """Returns the model that a run has exported.

  Raises:
    ValueError: none yet.
  """
  if not (run / "model" / "config.json").is_file():
    raise ValueError(
      f"{run} is the folder of a run that has exported no model yet; let it finish, or take a checkpoint with "
      f"python -m experiments.export_checkpoint --workdir={run} --output=DIR"
    )
  return run / "model"


def _stored_tensors(folder: pathlib.Path, leaves) -> dict[str, safetensors_files.Stored]:
  """Returns every tensor of a folder by its published name; `Qwen3VLModel.save_pretrained` leaves `model.` out."""
  stored = safetensors_files.stored_tensors(folder)
  if any(name.startswith(_PREFIX) for name in stored):
    return stored
  published = {name for leaf in leaves.values() for name in leaf.names}
  return {_PREFIX + name if _PREFIX + name in published else name: tensor for name, tensor in stored.items()}


def _check_names(directory: pathlib.Path, leaves, stored: Mapping[str, safetensors_files.Stored], tied: bool) -> None:
  """Raises one error for all tensors that do not fit, with a few names of each problem."""
  expected = {name: leaf.stored_shape for leaf in leaves.values() for name in leaf.names}
  # A tied checkpoint may repeat the embedding under the name of the head.
  unknown = sorted(stored.keys() - expected.keys() - ({_HEAD} if tied else set()))
  quantised = sorted(name for name, tensor in stored.items() if _is_quantised(name, tensor))
  if quantised:
    raise ValueError(
      f"{directory} holds quantised weights ({shown(stored[quantised[0]].dtype)}: {safetensors_files.few(quantised)}), "
      f"which cannot be trained or read here; take the checkpoint in bfloat16."
    )
  present = {name: stored[name] for name in expected if name in stored}
  problems: dict[str, tuple[list[str], Callable[[str], str]]] = {
    "missing": (sorted(expected.keys() - stored.keys()), str),
    "unknown": (unknown, shown),
    "misshaped": (
      [name for name, tensor in present.items() if tensor.shape != expected[name]],
      lambda name: f"{name} {shown(present[name].shape)} instead of {expected[name]}",
    ),
    "truncated": (
      [name for name, tensor in present.items() if not tensor.complete],
      lambda name: f"{name} in {shown(present[name].file.name)}",
    ),
    "not of a floating-point type": (
      [name for name, tensor in present.items() if tensor.dtype not in safetensors_files.DTYPES],
      lambda name: f"{name} {shown(present[name].dtype)}",
    ),
  }
  report = [
    f"{len(names):,} {problem}: {safetensors_files.few(names, show)}"
    for problem, (names, show) in problems.items()
    if names
  ]
  if report:
    raise ValueError(
      f"{directory} does not hold the weights that its config.json describes; {_other_names(unknown)}"
      + "; ".join(report)
    )


def _other_names(unknown: list[str]) -> str:
  """Says whose names a folder has, and the way out; "" where nothing is known of them."""
  if any(name.startswith("base_model.") for name in unknown):
    return "its names begin with 'base_model.' as those of PEFT: merge the adapter (merge_and_unload), and save that; "
  ending = "visual.patch_embed.proj.weight"
  prefix = next((name.removesuffix(ending) for name in unknown if name.endswith(ending)), None)
  if prefix is None:
    return ""
  return f"its names begin with {shown(prefix)} instead of {_PREFIX!r}: save it with transformers 5; "


def _is_quantised(name: str, tensor: safetensors_files.Stored) -> bool:
  return name.endswith(_QUANTISED_NAMES) or tensor.dtype.startswith(_QUANTISED_TYPES)


def _check_head(directory: pathlib.Path, stored: Mapping[str, safetensors_files.Stored]) -> None:
  """Refuses a head of its own beside `tie_word_embeddings`: it would be dropped.

  Raises:
    ValueError: its values are not those of the embedding.
  """
  head, embedding = stored[_HEAD], stored[f"{_PREFIX}language_model.embed_tokens.weight"]
  readable = head.complete and head.dtype in safetensors_files.DTYPES and head.shape == embedding.shape
  if not (readable and np.array_equal(head.array(), embedding.array())):
    raise ValueError(
      f"{directory}: {_HEAD} differs from the embedding although config.json has tie_word_embeddings=true; set that to "
      f"false to use this head, or remove the tensor to use the embedding."
    )


def _read(leaf: _Leaf, stored, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
  """Reads the slice `index` of a leaf and casts it while copying."""
  shape = (len(leaf.names), *leaf.shape) if leaf.stacked else leaf.shape
  bounds = [part.indices(size) for part, size in zip(index, shape, strict=True)]
  out = np.empty([stop - start for start, stop, _ in bounds], dtype)
  if not leaf.stacked:
    out[...] = stored[leaf.names[0]].array().reshape(leaf.shape)[index]
    return out
  for row, layer in enumerate(range(*bounds[0])):
    out[row] = stored[leaf.names[layer]].array().reshape(leaf.shape)[index[1:]]
  return out


def _placed(leaf: _Leaf, stored, dtype: np.dtype, place: NamedSharding | None) -> jax.Array:
  """Loads a leaf to its devices, one shard at a time on the host."""
  shape = (len(leaf.names), *leaf.shape) if leaf.stacked else leaf.shape
  if place is None:
    return jnp.asarray(_read(leaf, stored, (slice(None),) * len(shape), dtype))
  devices_of: dict[tuple, list[jax.Device]] = {}
  for device, index in place.addressable_devices_indices_map(shape).items():
    devices_of.setdefault(tuple((part.start, part.stop) for part in index or ()), []).append(device)
  shards = []
  for bounds, devices in devices_of.items():
    part = _read(leaf, stored, tuple(slice(*bound) for bound in bounds), dtype)
    shards += [jax.block_until_ready(jax.device_put(part, device)) for device in devices]
    # jax lets go of a transferred buffer at its next call; without this one, two shards would be alive at once.
    del part
    jax.device_put(np.float32(0))
  return jax.make_array_from_single_device_arrays(shape, place, shards)


def load_pretrained(
  directory: str | pathlib.Path,
  dtype: Any = jnp.float32,
  mesh: Mesh | None = None,
  *,
  layout: str = "train",
  unstack: bool = False,
  progress: Callable[[int, int], None] | None = None,
) -> tuple[Qwen3VLConfig, dict[str, Any]]:
  """Loads config and parameters of a checkpoint folder.

  Args:
    directory: a Hugging Face folder with safetensors, a folder that `save_orbax` wrote, or a Hub id.
    dtype: of the parameters.
    mesh: every shard is filled straight from the slices of the files it needs; without one, the default device.
    layout: of the weights on the mesh, "train" or "decode".
    unstack: unstack the decoder's layers, as `model.unstack_layers` does, without a second copy of them.
    progress: receives (leaves loaded, leaves in all) after each leaf.

  Raises:
    ValueError: another architecture, or one error that lists every missing, unknown, misshaped or truncated tensor.
  """
  folder = resolved_folder(directory)
  config = Qwen3VLConfig.from_directory(folder)
  in_orbax = (folder / _ORBAX).is_dir()  # it reads layers stacked as they were written
  shapes, axes = model.abstract_params(config, dtype), model.logical_axes(config)
  if unstack and not in_orbax:
    shapes, axes = jax.eval_shape(model.unstack_layers, shapes), model.unstacked_axes(config)
  places = sharding.weight_shardings(mesh, shapes, axes, layout) if mesh is not None else None
  if in_orbax:
    params = _restored(folder, shapes, places)
    return config, _unstack_restored(config, params, mesh, layout) if unstack else params
  leaves = _leaves(config, shapes)
  stored = _stored_tensors(folder, leaves)
  _check_names(folder, leaves, stored, config.tie_word_embeddings)
  if config.tie_word_embeddings and _HEAD in stored:
    _check_head(folder, stored)
  if (folder / CONFIG).exists():
    logging.warning(
      "%s has a PEFT adapter (%s) beside whole weights: it is not put on. Merge it first where it is not part of them.",
      folder,
      CONFIG,
    )
  flat_places = [None] * len(leaves) if places is None else jax.tree.leaves(places)
  flat = {}
  for (path, leaf), place in zip(leaves.items(), flat_places, strict=True):
    flat[path] = _placed(leaf, stored, np.dtype(dtype), place)
    if progress:
      progress(len(flat), len(leaves))
  return config, jax.tree.unflatten(jax.tree.structure(shapes), list(flat.values()))


def _unstack_restored(config: Qwen3VLConfig, params: Any, mesh: Mesh | None, layout: str) -> dict[str, Any]:
  """Applies `model.unstack_layers` leaf by leaf; deletes each stack before it splits the next."""
  decoder = params["language_model"]
  stacks, structure = jax.tree.flatten(decoder["layers"])
  axes = jax.tree.leaves(
    model.unstacked_axes(config)["language_model"]["layers"][0], is_leaf=lambda x: type(x) is tuple
  )
  columns = []
  for number, names in enumerate(axes):
    stack, stacks[number] = stacks[number], None
    place = None if mesh is None else sharding.weight_sharding(mesh, stack.shape[1:], names, layout)
    columns.append(jax.block_until_ready(jax.jit(tuple, out_shardings=place)(stack)))
    stack.delete()
  layers = tuple(jax.tree.unflatten(structure, row) for row in zip(*columns, strict=True))
  return {**params, "language_model": {**decoder, "layers": layers}}


def _restored(folder: pathlib.Path, shapes: Any, places: Any) -> Any:
  if places is None:
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    places = jax.tree.map(lambda _: device, shapes)
  target = jax.tree.map(
    lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, places
  )
  with ocp.StandardCheckpointer() as checkpointer:
    return checkpointer.restore(storage.orbax_path(folder) / _ORBAX, target)


def _check_params(config: Qwen3VLConfig, params: Params) -> None:
  def shapes(tree):
    return {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}

  expected, given = shapes(model.abstract_params(config)), shapes(params)
  wrong = sorted(path for path in expected.keys() | given.keys() if expected.get(path) != given.get(path))
  if wrong:
    lines = [f"{path} is {given.get(path)} instead of {expected.get(path)}" for path in wrong]
    raise ValueError(f"the parameters do not fit the config: {'; '.join(lines)}")


@functools.cache
def _gather(place: NamedSharding, dtype: np.dtype, stacked: bool):
  """Returns a compiled (leaf, layer) -> tensor that casts one tensor and all-gathers it to every host."""
  return jax.jit(
    lambda leaf, layer: (leaf[layer] if stacked else leaf).astype(dtype),
    out_shardings=sharding.replicated(place.mesh),
  )


def _tensor_source(leaves, params: Params, dtype: np.dtype):
  """Returns the function from a tensor's name to its array on the host.

  On one host a leaf is fetched whole, which compiles nothing; tensors are asked for leaf by leaf. On several hosts
  every process takes part in gathering one tensor at a time.
  """
  owner = {name: (path, layer) for path, leaf in leaves.items() for layer, name in enumerate(leaf.names)}

  @functools.lru_cache(maxsize=1)
  def host_leaf(path: tuple[str | int, ...]) -> np.ndarray:
    return np.asarray(_at(params, path))

  def tensor(name: str) -> np.ndarray:
    path, layer = owner[name]
    leaf = _at(params, path)
    stacked = leaves[path].stacked
    if isinstance(leaf, np.ndarray) or leaf.is_fully_addressable:
      value = host_leaf(path)[layer if stacked else ...].astype(dtype)
    else:
      value = np.asarray(_gather(leaf.sharding, dtype, stacked)(leaf, layer))
    return value.reshape(leaves[path].stored_shape)

  return tensor


def _at(tree: Any, path: tuple[str | int, ...]) -> Any:
  for name in path:
    tree = tree[name]
  return tree


def save_pretrained(
  directory: str | pathlib.Path,
  config: Qwen3VLConfig,
  params: Params,
  *,
  source: str | pathlib.Path | None = None,
  dtype: Any = jnp.bfloat16,
  max_shard_bytes: int = 5 * 10**9,
  declared: Mapping[str, str] | None = None,
) -> None:
  """Writes a folder that `Qwen3VLForConditionalGeneration.from_pretrained` and `AutoTokenizer` load.

  An earlier export in `directory` is replaced as a whole, once the new one is complete. With LoRA the weights are
  merged ones, and the folder adapter/ in it holds the matrices for PEFT.

  Args:
    directory: where to write; made if missing.
    config: sizes; with `lora` where params has its matrices.
    params: the tree of `load_pretrained`, sharded or not.
    source: the folder the model came from: tokenizer, chat template, processor and generation config are copied
      verbatim, config.json but for the dtype, tokenizer_config.json but for `declared`.
    dtype: of the weights in the file.
    max_shard_bytes: largest size of a file.
    declared: fields that are added to tokenizer_config.json: what the model was trained with.

  Raises:
    ValueError: parameters or source do not fit the config, or `directory` holds something other than an export.
    OSError: a file cannot be read or written, here or on another process: all processes raise, or none.
  """
  directory, dtype = pathlib.Path(directory), np.dtype(dtype)
  _check_params(config, params)
  origin, base = pathlib.PurePath(source).name if source else "", str(source) if source else None
  source, partial = multihost.run_on_all(lambda: _prepared(source, lora.base(config), directory))
  matrices, adapted = params.get(lora.PART, {}), config.lora
  config, params = merged_model(config, params, dtype)
  leaves = _leaves(config)
  tensor = _tensor_source(leaves, params, dtype)
  shapes = {name: leaf.stored_shape for leaf in leaves.values() for name in leaf.names}
  write = functools.partial(safetensors_files.write, partial, dtype=dtype, max_shard_bytes=max_shard_bytes)
  multihost.run_on_all(lambda: _write_gathered(write, shapes, tensor))
  if adapted is not None:
    tensors = tensors_of(matrices)
    multihost.run_on_all(lambda: save(partial, adapted, tensors, base=base))
  multihost.run_on_all(lambda: _finish(partial, directory, config, source, origin, dtype, declared))


def _write_gathered(
  write: Callable[[dict[str, tuple[int, ...]], Callable[[str], np.ndarray]], None],
  shapes: dict[str, tuple[int, ...]],
  tensor: Callable[[str], np.ndarray],
) -> None:
  """Writes tensors on the first process, while the others take part in gathering each of them.

  Args:
    write: (shapes, tensor) -> writes all of them, in their order.
    shapes: tensors by name.
    tensor: gives the array of a name; all processes must ask for the same names in the same order.
  """
  left = iter(shapes)

  def gathered(name: str) -> np.ndarray:
    chex.assert_equal(name, next(left))
    return tensor(name)

  try:
    if multihost.is_first():
      write(shapes, gathered)
  finally:
    if jax.process_count() > 1:
      for name in left:  # also where the disk is full: the others wait in a gather
        tensor(name)


def save_orbax(
  directory: str | pathlib.Path,
  config: Qwen3VLConfig,
  params: Params,
  *,
  source: str | pathlib.Path | None = None,
) -> None:
  """Writes a folder with a sharded Orbax copy of the parameters beside the side files; `load_pretrained` reads it.

  Every process writes its own shards; all of them must see the folder. Arguments and errors as `save_pretrained`.
  """
  directory = pathlib.Path(directory)
  _check_params(config, params)
  origin = pathlib.PurePath(source).name if source else ""
  source, partial = multihost.run_on_all(lambda: _prepared(source, lora.base(config), directory))
  config, params = merged_model(config, params, params["language_model"]["norm"]["weight"].dtype)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(storage.orbax_path(partial) / _ORBAX, params)
  dtype = np.dtype(jax.tree.leaves(params)[0].dtype)
  multihost.run_on_all(lambda: _finish(partial, directory, config, source, origin, dtype))


def _prepared(source, config: Qwen3VLConfig, directory: pathlib.Path) -> tuple[pathlib.Path | None, pathlib.Path]:
  """Checks the source; returns its local folder and the folder to write into."""
  return _checked_source(source, config, directory), _partial(directory)


def _partial(directory: pathlib.Path) -> pathlib.Path:
  """Makes an empty folder beside `directory`, renamed once it is complete; only the first process makes it."""
  partial = directory.with_name(f".{directory.name}.partial")
  if multihost.is_first():
    side_files.settle(partial, directory)
    partial.mkdir(parents=True)
  return partial


def _finish(
  partial: pathlib.Path,
  directory: pathlib.Path,
  config: Qwen3VLConfig,
  source,
  origin: str,
  dtype: np.dtype,
  declared: Mapping[str, str] | None = None,
) -> None:
  """Completes the folder and gives it its name; the first process alone."""
  if not multihost.is_first():
    return
  count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(model.abstract_params(config)))
  side_files.write(
    partial, config, source, name=directory.name, origin=origin, dtype=dtype.name, count=count, declared=declared
  )
  side_files.replace(partial, directory)


def _checked_source(source, config: Qwen3VLConfig, directory: pathlib.Path) -> pathlib.Path | None:
  side_files.check_replaceable(directory)
  if source is None:
    return None
  source = resolved_folder(source)
  if source.resolve() == directory.resolve():
    raise ValueError(f"{directory} is the source itself; write the export to another folder")
  stored = dataclasses.replace(Qwen3VLConfig.from_directory(source), attention=config.attention)
  if stored != config:
    raise ValueError(f"{source}/config.json describes another model than the one to be saved")
  return source


FOLDER = "adapter"  # inside an export
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_SUFFIXES = {lora.A: "lora_A", lora.B: "lora_B"}


def save(directory: pathlib.Path, config: LoraConfig, tensors: Mapping[str, np.ndarray], *, base: str | None) -> None:
  """Writes adapter_config.json and adapter_model.safetensors, in float32; the first process alone.

  Args:
    directory: an existing folder; `adapter/` in it is made.
    config: rank, scale and projections.
    tensors: `tensors_of` the part "lora" of the parameters.
    base: the model they were trained on, a folder or a Hub id, as PEFT records it.
  """
  if not multihost.is_first():
    return
  folder = directory / FOLDER
  folder.mkdir()
  shapes = {name: tensor.shape for name, tensor in tensors.items()}
  safetensors_files.write_file(folder / WEIGHTS, shapes, np.dtype(np.float32), tensors.__getitem__)
  (folder / CONFIG).write_text(json.dumps(config_record(config, base), indent=2) + "\n")


def merged_model(config: Qwen3VLConfig, params: Params, dtype: Any) -> tuple[Qwen3VLConfig, Params]:
  """Merges LoRA, if any, into weights of `dtype` with their sharding; returns config and parameters."""
  if config.lora is None:
    return config, params
  params = jax.tree.map(jnp.asarray, params)
  places = jax.tree.map(lambda leaf: leaf.sharding, lora.without(params))
  return lora.base(config), jax.jit(functools.partial(lora.merged, config, dtype=dtype), out_shardings=places)(params)


def config_record(config: LoraConfig, base: str | None) -> dict[str, object]:
  """Returns the content of adapter_config.json."""
  return {
    "peft_type": "LORA",
    "task_type": None,  # with a task PEFT would wrap the model in a class of that task, for text alone
    "base_model_name_or_path": base,
    "r": config.rank,
    "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
    "target_modules": list(config.targets),
    "lora_dropout": 0.0,
    "bias": "none",
    "fan_in_fan_out": False,
    "use_rslora": False,
    "use_dora": False,
    "init_lora_weights": True,
    "modules_to_save": None,
    "inference_mode": True,
  }


def tensors_of(matrices: Params) -> dict[str, np.ndarray]:
  """Returns PEFT's name -> float32 array on the host: lora_A [r, in] and lora_B [out, r] of every layer and projection.

  Where they lie on several hosts, all processes must take part.
  """
  tensors = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(matrices):
    module, target, matrix = (part.key for part in path)
    for layer, value in enumerate(sharding.to_host(leaf)):
      name = f"base_model.model.model.language_model.layers.{layer}.{module}.{target}.{_SUFFIXES[matrix]}.weight"
      tensors[name] = np.ascontiguousarray(np.asarray(value, np.float32).T)
  return dict(sorted(tensors.items()))
