"""How methods look, and how figures are written."""

import pathlib

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from kepo_jax.reporting import study_style
from tests import studies_data

ALL = {
  name: {"label": settings[0], "config": "" if name in studies_data.FREE else f"{name.split('-')[0]}.py"}
  for name, settings in (studies_data.FREE | studies_data.METHODS).items()
}


def test_methods_look_different_and_alike_in_every_study():
  looks = study_style.styles(ALL)
  assert len({(look.colour, str(look.line), look.marker) for look in looks.values()}) == len(looks)
  fewer = study_style.styles({name: ALL[name] for name in ("grpo", "kepo-tau1")})
  assert fewer["grpo"] == looks["grpo"] and fewer["kepo-tau1"] == looks["kepo-tau1"]  # the last of a family is full
  assert looks["kepo-tau1"].colour == study_style.full_colour("kepo") and looks["kepo-tau1"].line == "-"
  assert study_style.full_colour("kepo") == study_style.full_colour("kepo_released")


def test_families_can_be_told_apart_without_colours():
  looks = study_style.styles(ALL)
  markers = [
    looks[name].marker for name in ("sft", "grpo", "rloo", "gkd-1", "kepo_ke-tau1", "kepo-tau1", "start", "teacher")
  ]
  assert len({*markers}) == len(markers)


def test_shades_go_from_light_to_full():
  light = [sum(to_rgb(colour)) for colour in study_style.shades("#009E73", 5)]
  assert light == sorted(light, reverse=True) and len({*light}) == 5
  assert study_style.shades("#009E73", 5)[-1].upper() == "#009E73"


def test_families_and_their_representatives():
  groups = study_style.families(ALL)
  assert groups["Uniform distillation"] == ["gkd-0", "gkd-0.5", "gkd-1"] and "start" not in sum(groups.values(), [])
  assert study_style.focused(ALL) == ["sft_teacher", "grpo", "gkd-1", "kepo_ke-tau1", "kepo-tau1"]
  few = {name: ALL[name] for name in ("start", "grpo", "kepo-tau1")}
  assert study_style.families(few) == {"": ["grpo", "kepo-tau1"]} and study_style.focused(few) == ["grpo", "kepo-tau1"]
  many = {f"new-{n}": {"label": "", "config": "own.py"} for n in range(6)}
  assert study_style.families(many) == {"Others": list(many)}


def test_a_method_belongs_to_its_config_whatever_it_is_called():
  entries = [{"method": "rounds-2", "label": "B = 2", "config": "kepo"}, {"method": "start", "label": "", "config": ""}]
  assert [study_style.config_of(entry["method"], entry) for entry in entries] == ["kepo", "start"]
  assert study_style.config_of("x", {"config": "experiments/configs/kepo_ke.py"}) == "kepo_ke"
  described = study_style.described([*entries, entries[0] | {"label": "later"}])
  assert described == {"rounds-2": entries[0], "start": entries[1]}
  assert study_style.styles(described)["rounds-2"].colour == study_style.full_colour("kepo")


def simple():
  figure = Figure(figsize=(3, 2), layout="constrained")
  figure.subplots().fill_between([0, 1], [0, 0], [1, 2])
  study_style.heading(figure, "Title", "what it says " * 9)
  return figure


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_the_same_figure_gives_the_same_bytes(kind):
  first, again = (study_style.image_bytes(simple(), kind) for _ in range(2))
  assert first == again and b"matplotlib.org" not in first
  assert b"<dc:date>" not in first


def test_saving(tmp_path):
  (tmp_path / "other.txt").write_text("kept")
  assert study_style.save(simple(), tmp_path, "name") == ["name.png", "name.svg"]
  assert sorted(path.name for path in tmp_path.iterdir()) == ["name.png", "name.svg", "other.txt"]
  assert Image.open(tmp_path / "name.png").width == 450
  assert pathlib.Path(tmp_path / "name.svg").read_text().rstrip().endswith("</svg>")


def test_panels_above_hidden_ones_get_labels():
  grid = Figure().subplots(2, 3, sharex=True)
  study_style.hide_rest(grid, 5)
  assert [axis.get_visible() for axis in grid.ravel()] == [True] * 5 + [False]
  labelled = [grid[0, column].xaxis.get_tick_params()["labelbottom"] for column in range(3)]
  assert np.array_equal(labelled, [False, False, True])
