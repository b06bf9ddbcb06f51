"""The objective of METHOD.md in float64 numpy, token by token: the oracle of values and, by differences, of gradients.

Where the method looks at a policy without a gradient (pi_old, the importance weight), it looks here at the student of
the batch, while the objective is evaluated at another one. The ratio of a sequence is that of the other student:
GSPO's own objective, of which the program has only the gradient. With an importance weight per token there is no
objective of the sequence: the ratio is GSPO-token's then (arXiv:2507.18071, section 4.3), as the program has it.
"""

from collections.abc import Mapping

import numpy as np

from kepo_jax.objectives import losses
from tests.objectives import cases


def log_softmax(logits: np.ndarray, temperature: float) -> np.ndarray:
  """Log-probabilities over the allowed ids: logits [..., V]."""
  logits = np.where(cases.ALLOWED, np.float64(logits) / temperature, -np.inf)
  logits = logits - logits.max(-1, keepdims=True)
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def kl(p: np.ndarray, q: np.ndarray) -> float:
  """KL of log-probabilities over the same finite ids."""
  return float(sum(np.exp(a) * (a - b) for a, b in zip(p, q, strict=True)))


def divergence(teacher: np.ndarray, student: np.ndarray, token: int, loss: losses.KepoTokenLoss) -> float:
  """D of one token."""
  if loss.divergence == "sampled_k2":
    return float((student[token] - teacher[token]) ** 2 / 2)
  p, q = teacher[cases.ALLOWED], student[cases.ALLOWED]
  if 0 < loss.top_k < len(p):
    order = np.argsort(-p)
    top, rest = order[: loss.top_k], order[loss.top_k :]
    p, q = (np.append(x[top], np.log(np.exp(x[rest]).sum())) for x in (p, q))
  b = {"forward_kl": 0, "reverse_kl": 1}.get(loss.divergence, loss.jsd_weight)
  if b in (0, 1):
    return kl(q, p) if b else kl(p, q)
  m = np.log(b * np.exp(p) + (1 - b) * np.exp(q))
  return b * kl(p, m) + (1 - b) * kl(q, m)


def reference_kl(logp: float, reference: float, estimator: str) -> float:
  """The estimate of KL(pi_theta || pi_ref) from one token."""
  gap = logp - reference
  return {"k1": gap, "k2": gap**2 / 2, "k3": np.exp(-gap) + gap - 1}[estimator]


class Row:
  """What the terms need of one rollout (p, g)."""

  def __init__(self, values: Mapping[str, np.ndarray], student: np.ndarray, case: cases.Setting, row: tuple[int, int]):
    loss = case.token_loss
    self.length = int(values["mask"][row].sum())
    self.tokens = values["tokens"][row][: self.length]
    self.advantage, self.gate = float(values["advantages"][row]), bool(values["gate"][row])
    flags = {name: name in case.arrays and bool(values[name][row]) for name in ("injected", "supervised")}
    self.injected, self.supervised = flags["injected"], flags["supervised"]
    self.kept = "kept" not in case.arrays or bool(values["kept"][row])
    steps = range(self.length)
    self.logits = {"student": student[row], **{name: values[name][row] for name in ("teacher", "reference")}}

    def logps(logits, temperature=loss.temperature):
      return [log_softmax(logits[t], temperature)[self.tokens[t]] for t in steps]

    self.logps, cut = logps(student[row]), logps(values["student"][row])
    self.reference = logps(values["reference"][row])
    given = {name: values[name][row] for name in case.arrays if name.endswith("_logps")}
    self.old = given.get("old_logps", cut)
    self.sampler, self.shaping = given.get("sampler_logps"), given.get("shaping_logps")
    self.own_log_ratio = [self.logps[t] - self.old[t] for t in steps]
    self.mean_log_ratio = [sum(self.own_log_ratio) / max(1, self.length)] * self.length
    if loss.importance_cap:
      mean = sum(cut[t] - self.old[t] for t in steps) / max(1, self.length)
      self.mean_log_ratio = [mean + self.logps[t] - cut[t] for t in steps]

  def surrogate(self, t: int, loss: losses.KepoTokenLoss, sequence: bool) -> float:
    """What the policy term maximises at a token."""
    if self.injected and self.shaping is not None:
      p, gamma = np.exp(self.logps[t]), np.exp(np.float64(self.shaping[t]))
      return p / (p + gamma) * self.advantage
    ratio = np.exp((self.mean_log_ratio if sequence else self.own_log_ratio)[t])
    clipped = np.clip(ratio, 1 - loss.clip_low, 1 + loss.clip_high)
    weight = 1.0
    if loss.importance_cap and not self.injected:
      weight = min(np.exp(np.float64(self.old[t]) - self.sampler[t]), loss.importance_cap)
    return min(ratio * self.advantage, clipped * self.advantage) * weight

  def distance(self, t: int, loss: losses.KepoTokenLoss) -> float:
    """The divergence from the teacher at a token."""
    teacher, student = (log_softmax(self.logits[name][t], loss.distill_temperature) for name in ("teacher", "student"))
    return divergence(teacher, student, self.tokens[t], loss)


def slow_objective(values: Mapping[str, np.ndarray], case: cases.Setting, student: np.ndarray | None = None) -> float:
  """L_PG + lambda L_KD + beta L_ref + supervised likelihood of a batch of `cases.batch`.

  Args:
    values: arrays of the batch.
    case: the options.
    student: logits at which the objective is evaluated; by default the batch's own.
  """
  loss, options = case.token_loss, dict(case.inputs)
  student = values["student"] if student is None else student
  shape = values["mask"].shape[:2]
  rows = [row for row in (Row(values, student, case, i) for i in np.ndindex(*shape)) if row.kept]
  own, foreign = ([row for row in rows if row.supervised == side] for side in (False, True))
  gated = [row for row in rows if row.gate]
  rollouts = shape[0] * shape[1]  # N: those that are not kept count

  def mean(part, of):
    """A sum over rows and tokens with the weights of the aggregation."""
    kind = options.get("aggregation", "sequence_mean")
    tokens = sum(row.length for row in part)
    most = rollouts * options.get("max_tokens", values["mask"].shape[2])
    total = 0.0
    for row in part:
      share = {"sequence_mean": rollouts * row.length, "token_mean": tokens, "constant_length": most}[kind]
      total += sum(of(row, t) for t in range(row.length)) / max(1, share)
    return total

  distilled = 0.0
  if loss.distils:
    count = sum(row.length for row in gated)
    for row in gated:
      share = rollouts * row.length if options.get("normaliser") == "group_mean" else count
      distilled += sum(row.distance(t, loss) for t in range(row.length)) / max(1, share)
  return (
    -loss.policy_coefficient * mean(own, lambda row, t: row.surrogate(t, loss, case.sequence))
    + float(loss.distill_coefficient) * distilled
    + loss.reference_coefficient
    * mean(own, lambda row, t: reference_kl(row.logps[t], row.reference[t], loss.reference_estimator))
    - loss.supervised_coefficient * mean(foreign, lambda row, t: row.logps[t])
  )
