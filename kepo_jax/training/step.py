"""One step of KEPO, top to bottom: sample, explore, gate, update; and what it reports.

What surrounds the steps of a run is in `job`, and what they are made of (models, programs, data) is made in `setup`.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from kepo_jax import exploration, sharding
from kepo_jax.data.prompts import gold_completion
from kepo_jax.objectives import advantages
from kepo_jax.objectives import weights as weights_lib
from kepo_jax.training import metrics as metrics_lib
from kepo_jax.training import rollouts as rollouts_lib
from kepo_jax.training import setup, update
from kepo_jax.training.metrics import PhaseClock, StepResult
from kepo_jax.training.optimizer import TrainState
from kepo_jax.training.prefetch import Pending
from kepo_jax.training.rollouts import Groups
from kepo_jax.types import Example, Prompts


def train_step(
  run: setup.Run, state: TrainState, done: int, pending: Pending, clock: "PhaseClock"
) -> tuple[TrainState, StepResult]:
  """One step of KEPO (Algorithm 1 of arXiv:2602.00400) after `done` steps.

  Args:
    run: the models, data and programs.
    state: before the update; consumed.
    done: steps before this one.
    pending: the prompts of the step, and the rollouts that the device samples.
    clock: of the step.
  """
  config, objective, own = run.config, run.config.objective, run.config.own_rollouts
  prompts, sampled, written = pending.prompts, 0, 0
  metrics: dict[str, float] = {}
  hint_records: tuple[dict[str, Any], ...] = ()
  parts: list[Groups] = []

  if own:
    # 1. Sample G completions of each prompt and reward them; dynamic sampling asks further prompts.
    with clock("sampling"):
      groups = sampled_groups(run, pending)
    sampled = int(groups.mask.sum())
    metrics |= metrics_lib.reward_metrics(groups)
    if config.sampling.dynamic_rounds:
      with clock("prepare"):
        groups, asked = most_useful(run, groups)
        prompts = sharding.place(run.mesh, run.host_prompts(groups.examples, config.data.prompt))
      metrics |= asked
    # 2. Explore: prompts on which every rollout fails get hints, and accepted candidates replace rollouts.
    with clock("exploration"):
      outcome, written = explore(run, pending.weights, groups, done)
      sampled += sum(int(tried.mask.sum()) for row in outcome.candidates.values() for tried in row)
      rollouts_lib.inject(groups, exploration.injections(outcome, own, seed=(config.seed, done)))
    metrics |= exploration.exploration_metrics(
      outcome, prompts=len(groups.examples), rounds=config.exploration.rounds, examples=groups.examples
    )
    hint_records = metrics_lib.hint_records(outcome, groups, step=done + 1, prompts=config.log.samples)
    parts.append(groups)
  pending.release()  # the update needs the memory of the decode weights
  if own < config.batch.rollouts:
    with clock("supervision"):
      examples = parts[0].examples if parts else pending.examples
      given, tokens = supervised_rows(run, examples, prompts, done)
      written += tokens
      parts.append(given)
  groups = parts[0] if len(parts) == 1 else rollouts_lib.joined(*parts, axis=1)

  # 3. Gate the distillation by quality, and compare rewards inside each group.
  kept = np.ones_like(groups.supervised)
  if objective.mask_truncated:
    kept = ~rollouts_lib.truncated(groups, run.processor.end_ids)
  gate = np.zeros_like(groups.supervised)
  if objective.distill_weight:
    signal = rollouts_lib.gate_signal(groups.scores, objective.gate_signal)
    gate = np.asarray(weights_lib.quality_gate(signal, threshold=objective.gate_threshold, mode=objective.gate_mode))
    gate = gate & kept & (objective.gate_injected | ~groups.injected)
  advantage = np.zeros(groups.supervised.shape, np.float32)
  if own:
    advantage[:, :own] = advantages.group_advantages(groups.scores["total"][:, :own], kind=objective.advantage)

  # 4. Ask teacher and reference about the tokens, and update the student.
  with clock("teacher"):
    batch = rollouts_lib.experience(groups, prompts, advantage, gate, kept=kept)
    experience = sharding.place(run.mesh, batch)
    targets = run.programs.targets(experience.prompts, experience.tokens)
    jax.block_until_ready(targets)
  with clock("update"):
    compare = config.compares_gradients and (done + 1) % config.log.gradients_every == 0
    state, learned = run.programs.update(state, experience, targets, compare=compare)
    metrics |= update.means(jax.device_get(learned))
  return state, StepResult(done + 1, groups, gate, kept, experience, metrics, hint_records, sampled, written)


def sampled_groups(run: setup.Run, pending: Pending) -> Groups:
  """The student's rollouts; of further prompts as well, until P groups have a signal or the rounds are over (DAPO)."""
  groups = rollouts_lib.scored_groups(run.processor, pending.examples, pending.rollouts, run.scorer)
  for extra in range(1, run.config.sampling.dynamic_rounds + 1):
    further = run.further_questions(pending.done, extra, asked=groups.examples)
    if useful(run, groups).sum() >= len(pending.examples) or not further:
      break
    more = sharding.place(run.mesh, run.host_prompts(further, run.config.data.prompt))
    rollouts = run.programs.rollout(pending.weights, more, run.key("rollout", pending.done))
    groups = rollouts_lib.joined(
      groups, rollouts_lib.scored_groups(run.processor, further, rollouts, run.scorer), axis=0
    )
  return groups


def useful(run: setup.Run, groups: Groups) -> np.ndarray:
  """bool[P]: groups with a signal, and those that exploration may give one."""
  found = rollouts_lib.has_signal(groups)
  found[failed_prompts(run, groups)] = True
  return found


def most_useful(run: setup.Run, groups: Groups) -> tuple[Groups, dict[str, float]]:
  """The first P useful groups, filled up with others where there are too few; and how many there were."""
  usable, wanted = useful(run, groups), run.config.batch.prompts
  order = np.argsort(~usable, kind="stable")  # useful ones first, in the order in which they were asked
  asked = {"dynamic/asked": float(len(usable)), "dynamic/useful_frac": float(usable.mean())}
  return rollouts_lib.selected(groups, sorted(order[:wanted])), asked


def failed_prompts(run: setup.Run, groups: Groups) -> list[int]:
  """Rows of the batch that ask for hints."""
  if not run.config.explores:
    return []
  return exploration.triggered(groups.scores["accuracy"], groups.scores["total"], run.config.exploration.trigger)


def explore(run: setup.Run, weights: Any, groups: Groups, done: int) -> tuple[exploration.Exploration, int]:
  """Hinted sampling for the failed prompts of a step, and how many tokens of hints the teacher wrote for it."""
  config, written = run.config.exploration, 0

  def ask_hints(rows: Sequence[int], attempt: int) -> list[str]:
    nonlocal written
    examples = [groups.examples[row] for row in rows]
    prompts = run.prompts(examples, "hint_request")
    hints = rollouts_lib.on_host(run.programs.hint(prompts, run.key("hint", done, attempt)))
    written += int(hints.mask[: len(rows)].sum())
    return rollouts_lib.texts_of(run.processor, hints, prompts=len(rows))[:, 0].tolist()

  def sample_hinted(rows: Sequence[int], hints: Sequence[str], attempt: int) -> list[list[exploration.Candidate]]:
    examples = [groups.examples[row] for row in rows]
    prompts = run.prompts(examples, config.hint_prompt, hints=hints)
    rollouts = run.programs.candidate(weights, prompts, run.key("candidate", done, attempt))
    return rollouts_lib.candidates(run.processor, examples, hints, rollouts, run.scorer)

  rows = failed_prompts(run, groups)
  with contextlib.ExitStack() as phase:
    if rows:  # a teacher in host memory comes once for all rounds
      phase.enter_context(run.models["teacher"].resident.on_device())
    outcome = exploration.explore(
      rows,
      ask_hints,
      sample_hinted,
      rounds=config.rounds,
      replacements=config.replacements,
      accept=exploration.Acceptance(config.acceptance, config.leak_filter),
      hints=config.hints,
    )
  return outcome, written


def supervised_rows(run: setup.Run, examples: Sequence[Example], prompts: Prompts, done: int) -> tuple[Groups, int]:
  """What others wrote: gold answers, or those answers of the teacher that the reward accepts; the rest is empty.

  Returns:
    the groups, and how many tokens the teacher wrote.
  """
  config = run.config
  if config.supervised.source == "answer":
    texts = [gold_completion(example, run.processor.templates) for example in examples]
    rows = config.batch.rollouts - config.own_rollouts
    given = rollouts_lib.given_rollouts(run.processor, texts, rows, config.sampling.max_new_tokens)
    return rollouts_lib.supervised_groups(rollouts_lib.scored_groups(run.processor, examples, given, run.scorer)), 0
  answers = run.programs.answer(prompts, run.key("answer", done))
  groups = rollouts_lib.scored_groups(run.processor, examples, answers, run.scorer)
  accepted = rollouts_lib.accepted_answers(groups)
  return rollouts_lib.supervised_groups(groups, accepted=accepted), int(groups.mask.sum())
