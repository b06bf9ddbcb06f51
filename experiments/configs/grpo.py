"""GRPO, group-relative policy optimisation alone: the parent of every other config; each field is stated here once."""

import ml_collections

from experiments import settings


def get_config(setting: str = "phantom") -> ml_collections.ConfigDict:
  """No teacher in the loss, no hints.

  Args:
    setting: "phantom", or "medvqa" for the sizes of the paper (--config=experiments/configs/grpo.py:medvqa); see
      experiments/settings.py.
  """
  config = ml_collections.ConfigDict()
  config.seed = 0  # every random stream of a run derives from it

  config.model = ml_collections.ConfigDict()
  config.model.student = "experiments/assets/phantom/confused"  # Qwen3-VL folder (or hub id)
  config.model.teacher = "experiments/assets/phantom/weak"  # Qwen3-VL folder with the same tokenizer; loaded if used
  config.model.compute_dtype = "float32"  # student's activations; what is trained of it is float32 in any case
  config.model.teacher_dtype = "float32"  # weights and activations of teacher and reference
  config.model.teacher_memory = "device"  # where both live while they are not used; or host
  config.model.freeze_vision = False  # True keeps the vision tower, its mergers included, as loaded
  config.model.remat = "none"  # what the backward pass computes again: none, full, or dots, dots_offloaded between
  # The device's fused kernel where it can serve, plain elsewhere (auto); never (plain); or an error elsewhere (fused).
  config.model.attention = "auto"
  config.model.lora_rank = 0  # of matrices beside the frozen weights, which are then trained alone; 0: all weights are
  config.model.lora_alpha = 32.0  # their product is scaled by lora_alpha / lora_rank
  # Projections of the decoder with such matrices.
  config.model.lora_targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

  config.mesh = ml_collections.ConfigDict()
  config.mesh.data = -1  # -1: all devices that fsdp and tensor leave
  config.mesh.fsdp = 1
  config.mesh.tensor = 1

  config.data = ml_collections.ConfigDict()
  config.data.directory = ""  # data in a format of docs/data.md; empty: the phantom benchmark, drawn when missing
  config.data.split_files = ""  # a published split, verbatim: folder with train/ and test/; empty: cut by our rule
  config.data.lenient = False  # True leaves out, and counts, records and images that would stop a run
  config.data.train_modality = "MRI"
  config.data.train_items = 600  # questions
  config.data.validation_items = 40  # questions per modality, for evaluation during training
  config.data.test_items = 300  # questions per modality, for evaluation before and after
  config.data.split_seed = 0  # membership of the splits of real data; the phantom's are fixed
  config.data.resize = "native"  # native: aspect kept, area clamped by the model's processor; squash384: 384 x 384
  config.data.prompt = "think"  # what a student is asked in training: think (reason, then answer) or no_think
  config.data.templates = "brief"  # family of wordings in kepo_jax/data/prompts.py
  config.data.prompt_buckets = (56, 128, 256, 512, 1024)  # padded prompt lengths, tokens
  config.data.patch_buckets = (64, 256, 1024, 4096, 16384)  # padded patch rows per prompt

  config.batch = ml_collections.ConfigDict()
  config.batch.prompts = 8  # P, per step over all devices
  config.batch.rollouts = 8  # G, per prompt
  config.batch.on_policy_fraction = 1.0  # share of the G rollouts that the student samples; the rest are supervised
  config.batch.updates = 1  # updates per batch; with more, pi_old is scored before the first and the clip matters
  config.batch.micro_batches = 1  # the update runs over P / micro_batches prompts at a time

  config.sampling = ml_collections.ConfigDict()
  config.sampling.max_new_tokens = 24  # T
  config.sampling.temperature = 1.0
  config.sampling.top_p = 1.0  # below 1 the policy ratio is slightly off
  config.sampling.top_k = 0  # 0: all
  config.sampling.dynamic_rounds = 0  # further batches asked in a step until P groups have a signal (DAPO); 0: none

  config.reward = ml_collections.ConfigDict()
  config.reward.convention = "med_r1"  # what is accurate and well formed: med_r1, medvlm_r1, no_think, lenient
  config.reward.combination = "sum"  # of accuracy and format in the advantage; or product
  config.reward.accuracy = 1.0  # weight of accuracy, or of the product
  config.reward.format = 1.0  # weight of format in the sum
  config.reward.more = ""  # added to them: "name:weight, ...", a name of rewards.REWARDS or package.module.function

  config.objective = ml_collections.ConfigDict()
  config.objective.policy_weight = 1.0  # of the policy term; 0 leaves distillation or supervision alone
  config.objective.advantage = "group_std"  # or no_std (Dr.GRPO), rloo, batch_std
  config.objective.aggregation = "sequence_mean"  # of tokens; or token_mean (DAPO), constant_length (Dr.GRPO)
  config.objective.ratio = "token"  # what is clipped; or sequence (GSPO, with clips of about 3e-4)
  config.objective.clip_low = 0.2  # of the policy ratio; idle as long as a batch serves one update
  config.objective.clip_high = 0.2
  config.objective.importance_cap = 0.0  # largest weight for what the sampler computed otherwise, e.g. 2; 0: none
  config.objective.mask_truncated = False  # True: completions without an end token enter no term of the loss
  # Importance ratio of injected rollouts: drop_on_policy, drop_behaviour_shaped, drop_unit_shaped or keep_hint.
  config.objective.off_context = "drop_on_policy"
  config.objective.distill_weight = 0.0  # lambda; 0 drops the teacher from the update
  config.objective.distill_schedule = "constant"  # of lambda; or linear, down by 1/train.steps with every step
  config.objective.divergence = "jsd"  # or forward_kl, reverse_kl, sampled_k2
  config.objective.divergence_weight = 0.5  # b of the generalised Jensen-Shannon divergence
  config.objective.divergence_top_k = 0  # the teacher's k most likely ids and one bucket for the rest; 0: all ids
  config.objective.distill_temperature = 1.0  # of teacher and student inside the divergence
  config.objective.distill_normaliser = "gated_tokens"  # or group_mean
  config.objective.gate_signal = "accuracy"  # accuracy; or mean, sum or product of accuracy and format
  config.objective.gate_threshold = 1.0  # tau: smallest signal that is distilled
  config.objective.gate_mode = "positive"  # positive: signal >= tau; negative: below; none: all
  config.objective.gate_injected = True  # False: injected rollouts are never distilled
  config.objective.reference_weight = 0.0  # beta; 0 drops the reference model
  config.objective.reference_estimator = "k3"  # or k2, k1 (k1 has no mean gradient)
  config.objective.supervised_weight = 0.0  # of the likelihood of supervised rows
  config.objective.chunk = 1024  # completion tokens of a device whose logits exist at one time; one per row at least

  config.supervised = ml_collections.ConfigDict()
  config.supervised.source = "none"  # of rows that the student does not sample: answer (gold letter), teacher
  config.supervised.temperature = 1.0  # of the teacher's answers

  config.exploration = ml_collections.ConfigDict()
  config.exploration.trigger = "accuracy_all_zero"  # or reward_all_zero, always, never
  config.exploration.replacements = 0  # K, rollouts of a failed group that accepted candidates may replace
  config.exploration.rounds = 0  # B, rounds of hinted sampling per failed prompt
  config.exploration.candidates = 0  # M, sampled per prompt and round; 0: as many as replacements
  config.exploration.hints = "each_round"  # a new hint in each round; or once
  config.exploration.hint_prompt = "hint_and_answer"  # what a hinted student is shown; or hint_only
  config.exploration.hint_tokens = 24  # longest hint, tokens
  config.exploration.hint_temperature = 0.7
  config.exploration.acceptance = "accurate_and_formatted"  # or accurate, all_or_none, all_or_none_accurate
  config.exploration.leak_filter = True  # refuse candidates that talk about the help
  config.exploration.quoted_words = 0  # refuse those that repeat so many consecutive words of the hint; 0: none

  config.optimizer = ml_collections.ConfigDict()
  config.optimizer.learning_rate = 3e-4  # peak
  config.optimizer.warmup_steps = 5
  config.optimizer.b1 = 0.9
  config.optimizer.b2 = 0.999
  config.optimizer.eps = 1e-8
  config.optimizer.weight_decay = 0.0
  config.optimizer.moments = "float32"  # how Adam's two moments are stored; or bfloat16, float8 (docs/low_memory.md)
  config.optimizer.clip_norm = 1.0  # global gradient norm
  config.optimizer.skip_limit = 5  # updates in a row that may be skipped since loss or gradient are not finite

  config.train = ml_collections.ConfigDict()
  config.train.steps = 80  # batches; the learning rate decays linearly to 0 over them
  config.train.compile_ahead = True  # compile for all sizes of prompts and images before the first step; False: as met

  config.eval = ml_collections.ConfigDict()
  config.eval.every = 20  # steps between evaluations on the validation set; 0: none
  config.eval.prompts = 64  # questions per batch
  config.eval.prompt = "evaluation"  # reason, then answer; or no_think
  config.eval.max_new_tokens = 24
  config.eval.test = True  # evaluate the test set after training
  config.eval.before = True  # and before it

  config.checkpoint = ml_collections.ConfigDict()
  config.checkpoint.every = 20  # steps; 0: only by the clock, and the last step
  config.checkpoint.minutes = 10.0  # besides, so long after the last one; 0: never by the clock
  config.checkpoint.keep = 2  # newest checkpoints kept
  config.checkpoint.best = "out_of_domain"  # the best validation's is kept too: or in_domain, overall, none

  config.log = ml_collections.ConfigDict()
  config.log.samples = 1  # prompts per step whose rollouts go to samples.jsonl
  config.log.gradients_every = 20  # steps between comparisons of the two terms' gradients, if both exist; 0: never
  config.log.stall_seconds = 900.0  # warn, with stack traces, when nothing was completed for so long; 0: never
  config.log.tensorboard = True
  config.log.wandb = ""  # project name; needs wandb installed
  config.log.trackio = ""  # project name; needs trackio installed

  config.profile = ml_collections.ConfigDict()
  config.profile.steps = 0  # steps traced with the JAX profiler, after the second step
  return settings.apply(config, setting)
