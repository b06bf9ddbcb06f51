"""One step of KEPO, top to bottom: sample, explore, gate, update.

`train` calls it; `setup` makes what it works with: models, programs, data and rewards.
"""

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from kepo_jax import exploration, sharding
from kepo_jax.config import Config
from kepo_jax.data import batching
from kepo_jax.data.prompts import gold_completion
from kepo_jax.objectives import advantages
from kepo_jax.objectives import gate as gate_lib
from kepo_jax.training import metrics as metrics_lib
from kepo_jax.training import rollouts as rollouts_lib
from kepo_jax.training import setup, update
from kepo_jax.training.metrics import PhaseClock, StepResult
from kepo_jax.training.optimizer import TrainState
from kepo_jax.training.prefetch import Pending
from kepo_jax.training.rollouts import Groups
from kepo_jax.types import Example, Prompts


def train_step(run: setup.Run, state: TrainState, pending: Pending, clock: PhaseClock) -> tuple[TrainState, StepResult]:
  """Makes one step of KEPO (Algorithm 1 of arXiv:2602.00400).

  Args:
    run: the models, data and programs.
    state: before the update; consumed.
    pending: the prompts of the step, and the rollouts that the device samples.
    clock: of the step.

  Returns:
    the state after the update, and what the step reports.
  """
  config, objective, own = run.config, run.config.objective, run.config.own_rollouts
  step, examples, prompts = pending.step, pending.examples, pending.prompts
  metrics: dict[str, float] = {}
  hint_records: tuple[dict[str, Any], ...] = ()
  sampled = written = 0  # tokens of student and teacher
  groups: Groups

  if own:
    # 1. Sample G completions of each prompt and reward them; dynamic sampling asks further prompts.
    with clock("sampling"):
      groups = run.score(examples, pending.rollouts)
      if config.sampling.dynamic_rounds:
        groups = sample_further(run, pending, groups)
    sampled = int(groups.mask.sum())
    metrics |= metrics_lib.reward_metrics(groups)
    if config.sampling.dynamic_rounds:
      with clock("prepare"):
        useful = useful_groups(config, groups)
        groups = rollouts_lib.selected(groups, first_useful(useful, config.batch.prompts))
        examples, prompts = groups.examples, run.prompts(groups.examples, config.data.prompt)
      metrics |= {"dynamic/asked": float(len(useful)), "dynamic/useful_frac": float(useful.mean())}

    # 2. Explore: prompts on which every rollout fails get hints, and accepted candidates replace rollouts.
    with clock("exploration"):
      outcome, hint_tokens, candidate_tokens = explore(run, pending.weights, groups, step)
      rollouts_lib.inject(groups, exploration.injections(outcome, own, seed=(config.seed, step)))
    sampled, written = sampled + candidate_tokens, hint_tokens
    metrics |= exploration.exploration_metrics(
      outcome, prompts=len(examples), rounds=config.exploration.rounds, examples=examples
    )
    hint_records = metrics_lib.hint_records(outcome, groups, step=step + 1, prompts=config.log.samples)
  pending.release()  # the update needs the memory of the decode weights
  if own < config.batch.rollouts:  # the rows of a group that the student does not sample are supervised
    with clock("supervision"):
      supervised, answer_tokens = supervised_rows(run, examples, prompts, step)
    written += answer_tokens
    groups = rollouts_lib.joined(groups, supervised, axis=1) if own else supervised

  # 3. Gate the distillation by quality, and compare rewards inside each group.
  kept = np.ones_like(groups.supervised)
  if objective.mask_truncated:
    kept = ~rollouts_lib.truncated(groups, run.processor.end_ids)
  gate = np.zeros_like(groups.supervised)
  if objective.distill_weight:
    signal = gate_lib.SIGNALS[objective.gate_signal](groups.scores)
    gate = np.asarray(gate_lib.quality_gate(signal, threshold=objective.gate_threshold, mode=objective.gate_mode))
    gate = gate & kept & (objective.gate_injected | ~groups.injected)
  advantage = np.zeros(groups.supervised.shape, np.float32)
  if own:
    advantage[:, :own] = advantages.group_advantages(groups.scores["total"][:, :own], kind=objective.advantage)

  # 4. Score the tokens with teacher and reference; update the student.
  with clock("teacher"):
    experience = sharding.place(run.mesh, rollouts_lib.make_experience(groups, prompts, advantage, gate, kept=kept))
    targets = run.programs.targets(experience.prompts, experience.tokens)
    jax.block_until_ready(targets)
  with clock("update"):
    compare = config.compares_gradients and (step + 1) % config.log.gradients_every == 0
    state, sums = run.programs.update(state, experience, targets, compare=compare)
    metrics |= update.means(jax.device_get(sums))
  return state, StepResult(step + 1, groups, gate, kept, experience, metrics, hint_records, sampled, written)


def sample_further(run: setup.Run, pending: Pending, groups: Groups) -> Groups:
  """Samples further prompts until P groups are useful or the rounds are over (DAPO, arXiv:2503.14476).

  Args:
    run: the models, data and programs.
    pending: of the step.
    groups: of its own prompts.

  Returns:
    all groups, those of the further prompts behind the others.
  """
  config, wanted = run.config, run.config.batch.prompts
  for extra in range(1, config.sampling.dynamic_rounds + 1):
    asked = {example.id for example in groups.examples}
    order = batching.shuffled(run.questions["train"], config.seed, "further", pending.step, extra)
    further = [example for example in order if example.id not in asked][:wanted]
    if useful_groups(config, groups).sum() >= len(pending.examples) or len(further) < wanted:
      break
    prompts = run.prompts(further, config.data.prompt)
    key = setup.random_key(config.seed, "rollout", pending.step)
    rollouts = run.programs.rollout(pending.weights, prompts, key)
    groups = rollouts_lib.joined(groups, run.score(further, rollouts), axis=0)
  return groups


def failed_prompts(config: Config, groups: Groups) -> list[int]:
  """Returns the rows of the batch that ask for hints."""
  if not config.explores:
    return []
  return exploration.triggered(groups.scores["accuracy"], groups.scores["total"], config.exploration.trigger)


def useful_groups(config: Config, groups: Groups) -> np.ndarray:
  """Returns bool[P]: groups that have a signal or may get one by exploration."""
  useful = rollouts_lib.has_signal(groups)
  useful[failed_prompts(config, groups)] = True
  return useful


def first_useful(useful: np.ndarray, count: int) -> list[int]:
  """Returns `count` rows in rising order: the first useful ones, then others if there are too few."""
  return sorted(np.argsort(~useful, kind="stable")[:count])


def explore(run: setup.Run, decode_weights: Any, groups: Groups, step: int) -> tuple[exploration.Exploration, int, int]:
  """Samples under hints of the teacher for the failed prompts of a step.

  Args:
    run: the models, data and programs.
    decode_weights: of the student.
    groups: of the step.
    step: its number, from 0.

  Returns:
    the outcome, the number of hint tokens and the number of candidate tokens.
  """
  config, programs, rows = run.config, run.programs, failed_prompts(run.config, groups)
  sizes, tokens = setup.row_sizes(config), {"hint": 0, "candidate": 0}

  def ask_hints(rows: Sequence[int], attempts: Sequence[int]) -> list[list[str]]:
    prompts = run.prompts([groups.examples[row] for row in rows], "hint_request", sizes=sizes)
    keys = setup.round_keys(config, "hint", step, attempts)[None]  # one per completion of a prompt
    hints = rollouts_lib.on_host(programs.hint(prompts, sharding.place(run.mesh, keys)))
    tokens["hint"] += int(hints.mask[: len(rows)].sum())
    return rollouts_lib.texts_of(run.processor, hints, prompts=len(rows)).tolist()

  def sample_hinted(pairs: Sequence[tuple[int, int]], hints: Sequence[str]) -> list[list[exploration.Candidate]]:
    examples, attempts = [groups.examples[row] for row, _ in pairs], [attempt for _, attempt in pairs]
    batches = [size * config.rounds_at_once for size in sizes]
    prompts = run.prompts(examples, config.exploration.hint_prompt, hints=hints, sizes=batches)
    padding = [attempts[0]] * (len(prompts.row) - len(pairs))
    keys = setup.round_keys(config, "candidate", step, attempts + padding)[:, None]  # one per prompt
    rollouts = programs.candidate(decode_weights, prompts, sharding.place(run.mesh, keys))
    candidates = run.score(examples, rollouts)
    tokens["candidate"] += int(candidates.mask[: len(pairs)].sum())
    return rollouts_lib.to_candidates(candidates, hints)

  rounds: Any = functools.partial(exploration.explore_at_once, rows, ask_hints, sample_hinted)
  if config.exploration.serial:
    rounds = functools.partial(
      exploration.explore,
      rows,
      lambda rows, attempt: [text for (text,) in ask_hints(rows, [attempt])],
      lambda rows, hints, attempt: sample_hinted([(row, attempt) for row in rows], hints),
    )
  with contextlib.ExitStack() as phase:
    if rows:  # a teacher in host memory comes once for all rounds
      phase.enter_context(run.models["teacher"].weights.on_device())
    outcome = rounds(
      rounds=config.exploration.rounds,
      replacements=config.exploration.replacements,
      accept=exploration.Acceptance(config.exploration.acceptance, config.exploration.leak_filter),
      hints=config.exploration.hints,
    )
  return outcome, tokens["hint"], tokens["candidate"]


def supervised_rows(run: setup.Run, examples: Sequence[Example], prompts: Prompts, step: int) -> tuple[Groups, int]:
  """Builds groups of gold answers, or of teacher answers that the reward accepts. Other rows are empty.

  Args:
    run: the models, data and programs.
    examples: the questions.
    prompts: theirs, on the mesh.
    step: its number, from 0.

  Returns:
    the groups, and the number of tokens that the teacher wrote.
  """
  config = run.config
  if config.supervised.source == "answer":
    texts = [gold_completion(example, run.processor.templates) for example in examples]
    rows = config.batch.rollouts - config.own_rollouts
    answers = rollouts_lib.given_rollouts(run.processor, texts, rows, config.sampling.max_new_tokens)
    return rollouts_lib.supervised_groups(run.score(examples, answers)), 0
  groups = run.score(examples, run.programs.answer(prompts, setup.random_key(config.seed, "answer", step)))
  accepted = rollouts_lib.accepted_answers(groups)
  return rollouts_lib.supervised_groups(groups, accepted=accepted), int(groups.mask.sum())
