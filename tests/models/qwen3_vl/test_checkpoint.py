"""Checkpoints in and out: what is read is what is stored, and everything that does not fit is said."""

import dataclasses
import functools
import itertools
import json
import pathlib
import shutil
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from absl.testing import flagsaver

from kepo_jax import sharding
from kepo_jax.models.qwen3_vl import checkpoint, lora, model, safetensors_files, side_files
from kepo_jax.models.qwen3_vl.config import Qwen3VLConfig
from tests import fake_bucket
from tests.models.qwen3_vl import cases, runs
from tests.models.qwen3_vl.test_lora import ALPHA, CASE, RANK, adapted, drawn

RECORD = cases.config_record(dtype="float32")
CONFIG = Qwen3VLConfig.from_dict(RECORD)
PARAMS = cases.redrawn(model.abstract_params(CONFIG), seed=0)


def assert_same(actual, expected):
  jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, actual), expected)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  directory = tmp_path_factory.mktemp("source") / "tiny"
  checkpoint.save_pretrained(directory, CONFIG, PARAMS, dtype=np.float32)
  (directory / "config.json").write_text(json.dumps(RECORD))
  (directory / "tokenizer.json").write_bytes(b'{"a":\r\n 1}')
  (directory / "chat_template.jinja").write_text("{{ messages }}")
  (directory / "optimizer.bin").write_text("no side file")
  return directory


@pytest.fixture
def broken(source, tmp_path):
  """`broken(change)`: the source's folder after `change` edited its tensors."""

  def make(change, record=RECORD):
    tensors = safetensors.numpy.load_file(source / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(record))
    return tmp_path

  return make


def test_names_and_shapes_are_those_of_the_checkpoint(source):
  config, params = checkpoint.load_pretrained(source)
  assert config == CONFIG
  assert_same(params, PARAMS)
  tensors = safetensors.numpy.load_file(source / "model.safetensors")  # a reader that is not ours
  # 4 blocks of 12 tensors, 4 mergers of 6, 2 for the patches, 1 table; 4 layers of 11, embedding and norm.
  assert len(tensors) == 4 * 12 + 4 * 6 + 3 + 4 * 11 + 2
  assert tensors["model.visual.patch_embed.proj.weight"].shape == (32, 3, 2, 4, 4)
  assert tensors["model.visual.deepstack_merger_list.2.linear_fc1.weight"].shape == (128, 128)
  np.testing.assert_array_equal(
    tensors["model.language_model.layers.3.self_attn.q_proj.weight"],
    PARAMS["language_model"]["layers"]["self_attn"]["q_proj"]["weight"][3],
  )


@pytest.fixture(scope="module")
def orbax(source, tmp_path_factory):
  folder = tmp_path_factory.mktemp("orbax") / "tiny"
  checkpoint.save_orbax(folder, CONFIG, PARAMS, source=source)
  return folder


@pytest.fixture
def stored(request):
  return request.getfixturevalue(request.param)


def test_shards_with_an_index_hold_the_same_bfloat16_weights(source, tmp_path):
  checkpoint.save_pretrained(tmp_path / "out", CONFIG, PARAMS, source=source, max_shard_bytes=30_000)
  index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
  files = sorted((tmp_path / "out").glob("*.safetensors"))
  assert len(files) > 2 and {file.name for file in files} == set(index["weight_map"].values())
  total = 2 * sum(leaf.size for leaf in jax.tree.leaves(PARAMS))
  assert index["metadata"]["total_size"] == total
  assert len(files) <= 2 * total // 30_000 + 1  # two neighbours are more than one file may hold
  assert all(file.stat().st_size < 30_000 + 10_000 for file in files)  # tensors and a header
  _, params = checkpoint.load_pretrained(tmp_path / "out")
  assert_same(params, jax.tree.map(lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32), PARAMS))


def test_export_keeps_the_source_but_for_the_dtype(source, tmp_path):
  checkpoint.save_pretrained(tmp_path / "out", CONFIG, PARAMS, source=source)
  # An earlier export is replaced, and the form of attention is that of a run.
  plain = dataclasses.replace(CONFIG, attention="plain")
  checkpoint.save_pretrained(tmp_path / "out", plain, PARAMS, source=source)
  assert json.loads((tmp_path / "out" / "config.json").read_text()) == RECORD | {"dtype": "bfloat16"}
  names = {file.name for file in (tmp_path / "out").iterdir()}
  assert names == {"README.md", "chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"}
  assert (tmp_path / "out" / "tokenizer.json").read_bytes() == b'{"a":\r\n 1}'


def test_an_export_says_how_the_model_was_trained(source, tmp_path):
  declared = {"kepo_templates": "standard", "kepo_resize": "native"}

  def exported(name, source, **options):
    checkpoint.save_pretrained(tmp_path / name, CONFIG, PARAMS, source=source, **options)
    return tmp_path / name / "tokenizer_config.json"

  first = exported("first", source, declared=declared)
  assert json.loads(first.read_text()) == declared  # the source has no such file
  first.write_text('{"eos_token": "é", "kepo_resize": "squash384"}', encoding="utf-8")
  again = exported("again", first.parent, declared=declared)
  assert json.loads(again.read_text(encoding="utf-8")) == {"eos_token": "é"} | declared
  assert exported("copy", first.parent).read_bytes() == first.read_bytes()
  first.write_text("{")
  with pytest.raises(ValueError, match="tokenizer_config.json of the source is no"):
    exported("bad", first.parent, declared=declared)


def test_what_does_not_fit_is_not_written(source, tmp_path):
  (tmp_path / "thesis.tex").write_text("years of work")
  with pytest.raises(ValueError, match="no earlier export"):
    checkpoint.save_pretrained(tmp_path, CONFIG, PARAMS, source=source)
  assert (tmp_path / "thesis.tex").exists()
  params = PARAMS | {"lm_head": {"weight": np.zeros((96, 32), np.float32)}}
  with pytest.raises(ValueError, match=r"lm_head.*instead of None"):
    checkpoint.save_pretrained(tmp_path / "out", CONFIG, params)
  with pytest.raises(ValueError, match="is the source itself"):
    checkpoint.save_pretrained(source, CONFIG, PARAMS, source=source)
  other = dataclasses.replace(CONFIG, image_token_id=89)
  with pytest.raises(ValueError, match="describes another model"):
    checkpoint.save_pretrained(tmp_path / "out", other, PARAMS, source=source)
  assert not (tmp_path / "out").exists()


class Killed(BaseException):
  """What no handler of the code under test can catch."""


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("call", range(5))
def test_an_export_that_was_killed_is_finished_by_the_next(source, tmp_path, monkeypatch, call, after):
  """Killed before or after each renaming and deleting; half of a folder may be gone by then."""
  directory, later = tmp_path / "out", jax.tree.map(lambda x: x + 1, PARAMS)
  export = functools.partial(checkpoint.save_pretrained, directory, CONFIG, source=source, dtype=np.float32)
  export(PARAMS)
  old = {path.name for path in directory.iterdir()}
  calls = itertools.count()

  def mortal(original):
    def run(path, *args, **kwargs):
      if (fatal := next(calls) == call) and not after:
        if original is delete:
          (path / "README.md").unlink(missing_ok=True)
        raise Killed
      original(path, *args, **kwargs)
      if fatal:
        raise Killed

    return run

  delete = shutil.rmtree
  with monkeypatch.context() as patch, pytest.raises(Killed):
    patch.setattr(shutil, "rmtree", mortal(delete))
    patch.setattr(pathlib.Path, "rename", mortal(pathlib.Path.rename))
    export(later)
  if directory.exists():  # a whole model, old or new
    assert {path.name for path in directory.iterdir()} == old
    found = jax.tree.leaves(checkpoint.load_pretrained(directory)[1])
    assert any(all(map(np.array_equal, found, jax.tree.leaves(params))) for params in (PARAMS, later))
  side_files.check_replaceable(directory)
  export(later)
  assert_same(checkpoint.load_pretrained(directory)[1], later)
  assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_old_model_comes_back_if_no_new_one_took_its_place(source, tmp_path, monkeypatch):
  directory = tmp_path / "out"
  checkpoint.save_pretrained(directory, CONFIG, PARAMS, source=source, dtype=np.float32)
  directory.rename(tmp_path / ".out.replaced")  # killed between two renamings
  monkeypatch.setattr(safetensors_files, "write", lambda *args, **kwargs: 1 / 0)  # and again, while weights are written
  with pytest.raises(ZeroDivisionError):
    checkpoint.save_pretrained(directory, CONFIG, PARAMS, source=source)
  assert_same(checkpoint.load_pretrained(directory)[1], PARAMS)


def test_one_error_lists_everything_that_does_not_fit(broken):
  def change(tensors):
    del tensors["model.language_model.norm.weight"]
    tensors["model.visual.extra"] = np.zeros(3, np.float32)
    tensors["model.visual.merger.linear_fc2.bias"] = np.zeros(31, np.float32)
    tensors["model.visual.pos_embed.weight"] = tensors["model.visual.pos_embed.weight"].astype(np.int32)

  with pytest.raises(ValueError) as caught:
    checkpoint.load_pretrained(broken(change))
  for problem in (
    "1 missing: model.language_model.norm.weight",
    "1 unknown: 'model.visual.extra'",
    "1 misshaped: model.visual.merger.linear_fc2.bias (31,) instead of (32,)",
    "1 not of a floating-point type: model.visual.pos_embed.weight 'I32'",
  ):
    assert problem in str(caught.value)


def test_truncated_tensors_are_listed(broken):
  folder = broken(lambda tensors: None)
  file = folder / "model.safetensors"
  file.write_bytes(file.read_bytes()[:-8])
  # The last tensor in the file is the last name in the alphabet.
  with pytest.raises(ValueError, match="1 truncated: model.visual.pos_embed.weight in 'model.safetensors'"):
    checkpoint.load_pretrained(folder)
  file.write_bytes(file.read_bytes()[:100])
  with pytest.raises(ValueError, match="truncated or not a safetensors file"):
    checkpoint.load_pretrained(folder)


def test_what_is_no_folder_is_refused(tmp_path):
  with pytest.raises(ValueError, match="is no folder"):
    checkpoint.load_pretrained(tmp_path / "absent")
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(ValueError, match="config.json is not JSON"):
    checkpoint.load_pretrained(tmp_path)
  with pytest.raises(ValueError, match="Hub did not deliver it"):
    checkpoint.load_pretrained("org/name")  # the suite is offline


def test_an_untied_checkpoint_needs_its_head(broken):
  with pytest.raises(ValueError, match="1 missing: lm_head.weight"):
    checkpoint.load_pretrained(broken(lambda tensors: None, RECORD | {"tie_word_embeddings": False}))


def test_host_holds_one_shard_at_a_time(tmp_path, mesh_of):
  # Wide enough that Python's own objects do not count: the MLP leaf is 4 layers x 64 x 2048 numbers.
  record = cases.config_record(text={"hidden_size": 64, "intermediate_size": 2048, "vocab_size": 512})
  config = Qwen3VLConfig.from_dict(record)
  params = cases.redrawn(model.abstract_params(config), seed=1)
  checkpoint.save_pretrained(tmp_path / "wide", config, params, dtype=np.float32)
  mesh = mesh_of(1, 4, 2)
  largest_leaf = max(leaf.nbytes for leaf in jax.tree.leaves(params))
  assert largest_leaf == 4 * 64 * 2048 * 4

  checkpoint.load_pretrained(tmp_path / "wide", mesh=mesh)  # imports and compilations count in the first load
  tracemalloc.start()
  _, loaded = checkpoint.load_pretrained(tmp_path / "wide", mesh=mesh)
  kept, peak = tracemalloc.get_traced_memory()  # a CPU device may adopt a shard instead of copying it
  tracemalloc.stop()

  assert_same(loaded, params)
  largest_shard = max(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(loaded))
  assert largest_shard == largest_leaf // 8
  assert peak - kept < 1.5 * largest_shard


@pytest.mark.parametrize(
  ("stored", "layout"), [("source", "train"), ("source", "decode"), ("orbax", "decode")], indirect=["stored"]
)
def test_layers_side_by_side_are_those_of_the_stack(stored, layout, mesh_of):
  mesh, wanted = mesh_of(1, 4, 2), model.unstack_layers(PARAMS)
  _, params = checkpoint.load_pretrained(stored, mesh=mesh, layout=layout, unstack=True)
  assert_same(params, wanted)
  places = sharding.weight_shardings(mesh, wanted, model.unstacked_axes(CONFIG), layout)
  assert jax.tree.all(jax.tree.map(lambda x, place: x.sharding.is_equivalent_to(place, x.ndim), params, places))


@pytest.mark.parametrize("stored", ["source", "orbax"], indirect=True)
def test_layers_side_by_side_are_no_second_copy(stored, monkeypatch):
  in_stacks = max(leaf.nbytes for leaf in jax.tree.leaves(PARAMS["language_model"]["layers"]))
  spare = in_stacks if stored.parent.name.startswith("orbax") else 1000
  kept = sum(x.nbytes for x in jax.live_arrays())
  most, waits = [0], jax.block_until_ready

  def waited(x):
    result = waits(x)
    most[0] = max(most[0], sum(x.nbytes for x in jax.live_arrays()))
    return result

  monkeypatch.setattr(jax, "block_until_ready", waited)
  _, params = checkpoint.load_pretrained(stored, mesh=sharding.make_mesh(1, 1, 1), unstack=True)
  assert 0 < most[0] - kept <= sum(leaf.nbytes for leaf in jax.tree.leaves(params)) + spare


@pytest.fixture
def convert_qwen_vl(program):
  return program("experiments.convert_qwen_vl")


def test_a_bucket_is_converted_like_a_disk(convert_qwen_vl, source, tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  bucket = tmp_path / "cloud" / "bucket"
  (bucket / "mine").mkdir(parents=True)
  (bucket / "mine" / "thesis.txt").write_text("of somebody")

  def convert(origin, target, to="hf"):
    with flagsaver.flagsaver(to=to, dtype="float32"):
      convert_qwen_vl.main(["", str(origin), str(target)])

  with fake_bucket.served(tmp_path / "cloud") as store:
    convert(source, "gs://bucket/orbax", "orbax")
    assert store.uploads[-1] == "bucket/orbax/config.json" and (bucket / "orbax" / "tokenizer.json").exists()
    for target, back in (("gs://bucket/back", bucket / "back"), (tmp_path / "back", tmp_path / "back")):
      convert("gs://bucket/orbax", target)
      assert (back / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert_same(checkpoint.load_pretrained("gs://bucket/back")[1], PARAMS)
    with pytest.raises(ValueError, match="gs://bucket/mine exists and is no earlier export"):
      convert(source, "gs://bucket/mine")
  assert (bucket / "mine" / "thesis.txt").exists()


SOME = ("v_proj", "up_proj")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  folder = tmp_path_factory.mktemp("adapters") / "base"
  checkpoint.save_pretrained(folder, CASE.config, lora.without(drawn(adapted())), dtype=jnp.float32)
  return folder


@pytest.fixture(scope="module", params=[tuple(lora.TARGETS), SOME], ids=["all", "some"])
def exported(request, base):
  config = adapted(request.param)
  params, folder = drawn(config), base.parent / f"student-{len(request.param)}"
  checkpoint.save_pretrained(folder, config, params, source=base, dtype=jnp.float32)
  return config, params, folder


def test_the_export_and_a_sharded_copy_hold_merged_weights(exported, tmp_path):
  config, params, folder = exported
  merged = lora.merged(config, params, jnp.float32)
  loaded_config, loaded = checkpoint.load_pretrained(folder)
  assert loaded_config == CASE.config and "lora" not in (folder / "config.json").read_text()
  assert sorted(path.name for path in (folder / "adapter").iterdir()) == [checkpoint.CONFIG, checkpoint.WEIGHTS]
  checkpoint.save_orbax(tmp_path / "copy", config, params)
  for weights in (loaded, checkpoint.load_pretrained(tmp_path / "copy")[1]):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), weights, merged)


def test_the_tensors_of_the_adapter(exported, base):
  config, params, folder = exported
  found = safetensors_files.tensors_in(folder / "adapter" / checkpoint.WEIGHTS)
  assert len(found) == 2 * 4 * len(config.lora.targets)
  for target in SOME:
    module = lora.TARGETS[target]
    name = f"base_model.model.model.language_model.layers.2.{module}.{target}"
    a, b = (found[f"{name}.lora_{letter}.weight"].array() for letter in "AB")
    np.testing.assert_array_equal(a, np.asarray(params[lora.PART][module][target][lora.A][2]).T)
    np.testing.assert_array_equal(b, np.asarray(params[lora.PART][module][target][lora.B][2]).T)
  record = json.loads((folder / "adapter" / checkpoint.CONFIG).read_text())
  assert (record["r"], record["lora_alpha"]) == (RANK, ALPHA) and isinstance(record["lora_alpha"], int)
  assert record["target_modules"] == list(config.lora.targets)
  assert record["base_model_name_or_path"] == str(base)


def test_a_new_export_replaces_the_adapter_as_well(base, tmp_path):
  folder = tmp_path / "model"
  checkpoint.save_pretrained(folder, adapted(SOME), drawn(adapted(SOME)), source=base)
  assert (folder / "adapter").exists()
  checkpoint.save_pretrained(folder, CASE.config, lora.without(drawn(adapted())), source=base)
  assert not (folder / "adapter").exists()


def test_matrices_that_do_not_fit_are_refused(base, tmp_path):
  for config in (adapted(), CASE.config):
    with pytest.raises(ValueError, match="do not fit the config.*'lora'"):
      checkpoint.save_pretrained(tmp_path / "model", config, drawn(adapted(SOME)), source=base)
  assert not (tmp_path / "model").exists()


@pytest.mark.parity
def test_peft_says_the_same_and_would_write_the_same(exported, base, tmp_path):
  pytest.importorskip("torch")
  peft = pytest.importorskip("peft")
  from tests.models.qwen3_vl.oracle import Oracle

  config, params, folder = exported
  completions = CASE.completions()
  plain, merged = (Oracle(path, CASE) for path in (base, folder))
  adapter = peft.PeftModel.from_pretrained(plain.model, folder / "adapter")
  theirs = plain.loss_and_logits(completions)[1]  # PEFT has put its layers into the model
  np.testing.assert_allclose(theirs, merged.loss_and_logits(completions)[1], rtol=1e-5, atol=1e-5)
  ours = runs.logits(config, params, CASE.prompts()[0], completions)
  np.testing.assert_allclose(theirs, ours, rtol=1e-5, atol=1e-5)

  adapter.save_pretrained(tmp_path)
  mine, written = (safetensors_files.tensors_in(path / checkpoint.WEIGHTS) for path in (folder / "adapter", tmp_path))
  assert mine.keys() == written.keys()
  for name, tensor in written.items():
    np.testing.assert_array_equal(mine[name].array(), tensor.array(), strict=True, err_msg=name)
  record, written = (json.loads((path / checkpoint.CONFIG).read_text()) for path in (folder / "adapter", tmp_path))
  different = {name for name in record if written[name] != record[name]}
  assert different <= {"target_modules"} and set(written["target_modules"]) == set(record["target_modules"])

  state = adapter.merge_and_unload().state_dict()
  for name, tensor in safetensors_files.stored_tensors(folder).items():
    np.testing.assert_allclose(state[name].numpy(), tensor.array(), atol=1e-6, err_msg=name)
