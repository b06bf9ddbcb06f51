"""The reward conventions of METHOD, case by case: in a table, an expected value comes before the texts that get it."""

import dataclasses
import time

import hypothesis
from hypothesis import strategies as st

from kepo_jax import rewards
from kepo_jax.types import Example

BRAIN = Example(
  id="x/1", question="Which organ?", options=("Chest", "Brain", "Left knee."), answer="B", images=(), modality="MRI"
)
RIGHT = "<think>a</think><answer>B</answer>"
THINKING_ALOUD = "<think>not <answer>A</answer></think><answer>B</answer>"  # an answer block inside the think block


def assert_table(function, *rows):
  """Compares a function of a text with a table of rows (expected value, text, text, ...)."""
  expected = {text: value for value, *texts in rows for text in texts}
  assert {text: function(text) for text in expected} == expected


def test_accuracy():
  assert_table(
    lambda text: rewards.accuracy(text, BRAIN),
    (1, RIGHT, "<answer>\n B </answer> and more"),
    (1, RIGHT + "\n", "<answer>B</answer><answer>A</answer>"),  # what follows the first block is not looked at
    (0, "<answer>A</answer><answer>B</answer>", THINKING_ALOUD),  # the first block counts, wherever it stands
    (0, "<answer><answer>B</answer></answer>"),  # the first block holds "<answer>B"
    (0, "<answer>A\nB</answer>", "<answer></answer>", "<answer> </answer>B", "<answer>B)</answer>"),
    (0, "<answer>Brain</answer>", "<answer>b</answer>"),  # case matters
    (0, "<ANSWER>B</ANSWER>"),  # that of the tags as well: here is no block, and the whole is compared
    (1, "B", "  B\n"),  # likewise
    (0, "The answer is B", "<think>a</think>B", "<answer>B", "</answer>B<answer>", ""),
  )


def test_strict_format():
  assert_table(
    rewards.strict_format,
    (1, RIGHT, "<think>two\nlines</think>\n \n<answer>any\nthing</answer>", "<think></think><answer></answer>"),
    # The blocks stretch over tags inside.
    (1, THINKING_ALOUD, "<think><think>a</think></think><answer>B</answer>"),
    (1, "<think>a</think><answer><answer>B</answer></answer>"),
    (1, "<think>a</think><answer>A</answer> or <answer>B</answer>"),
    (0, RIGHT + "\n", RIGHT + " ", "\n" + RIGHT, "<think>a</think> so <answer>B</answer>", "B", ""),
    (0, "<answer>B</answer><think>a</think>", "<answer>B</answer>", "<think>a<answer>B</answer>"),
    (0, "<think>a</think><answer>B", "<THINK>a</THINK><answer>B</answer>"),
  )


def test_answer_format():
  assert_table(
    rewards.answer_format,
    (1, "<answer>B</answer>", "<answer>\n B\n</answer>", "<answer></answer>"),
    (0, "<answer>B</answer> ", "<answer>B</answer>\n", " <answer>B</answer>", "<ANSWER>B</ANSWER>", RIGHT, "B", ""),
    (0, "<answer>A</answer><answer>B</answer>", "<answer><answer>B</answer></answer>"),  # one block
  )


def test_medvlm_accuracy():
  assert_table(
    lambda text: rewards.medvlm_accuracy(text, BRAIN),
    (1, "<answer>B</answer>", "<Answer>\n B </ANSWER>", "<answer>B</answer><answer>A</answer>"),
    (0.5, "<answer>B) Brain</answer>", "<answer>B.</answer>", "<ANSWER>the letter\nB, surely</ANSWER>"),
    (0.5, "<answer>B, not K</answer>"),  # there are letters from A to J
    (0.5, "<answer><ANSWER>B</answer></answer>"),  # the first block holds "<ANSWER>B": other text
    (0, "<answer>A or B</answer>", "<answer>A, B, C</answer>", "<answer>B B</answer>"),
    (0, "<answer>I say B</answer>"),  # a pronoun is a letter too
    (0, "<answer>Brain</answer>"),  # the letter must stand alone
    (0, "<answer>b</answer>", "<answer>A</answer>", "<answer>A) Chest</answer>", "<answer></answer>", "B", ""),
    (0, "<answer>A</answer><answer>B</answer>", THINKING_ALOUD),
  )


def test_answer_letter():
  assert_table(
    rewards.answer_letter,
    ("B", "<think>x</think> <answer> B </answer>", "<answer>\nB\n</answer>", "<answer><answer>B</answer></answer>"),
    ("C", "<answer>the brain</answer> <answer>C</answer>"),
    ("Brain", "<answer>Brain</answer>"),  # parsed, and wrong
    ("b", "<answer>b</answer>"),
    (None, "<answer>B.</answer>", "<answer>left knee</answer>", "<answer></answer>", "<ANSWER>B</ANSWER>", "B"),
  )


LENIENT = (
  # Which part of a completion is read.
  ("B", RIGHT, "<answer>(b)</answer>", "<ANSWER>b</ANSWER>", "<answer>\nB\n</answer>"),
  ("B", "<answer><answer>B</answer></answer>", "<think>the answer is A</think><answer>(B)</answer>"),
  (None, "<think>A</think>", "<think>the answer is B"),  # what is thought is no answer, nor is an unfinished thought
  ("B", "<think>A or C?</think> The answer is B.", "<think>x</think>\nThe answer is B. <think>C"),
  ("C", "<think>x</think><answer>C"),
  ("A", THINKING_ALOUD),  # as the strict parser reads it
  (None, "<answer></answer>", "<answer></answer>B", ""),
  # The text of an option.
  ("B", "<answer>brain.</answer>"),
  ("C", "<answer>Left  knee</answer>", "left knee"),
  (None, "left", "brain and chest"),
  # A letter at the beginning.
  ("B", "B", "b", "B.", "'B'.", "**B**", "**B) Brain**", "B: Brain", "B.Brain", "B - Brain", "B Brain", "b) brain"),
  ("B", "B Brain, since it shows gyri", "B. The image shows gyri", "B\nThe image shows gyri"),
  ("B", "B because of the gyri", "The answer B", "B is the right answer"),
  ("C", "(c)", "Option C: left knee"),
  ("A", "option a", "A is correct"),
  (None, "D", "D: Liver"),  # there are three options
  # Words that begin like a letter.
  (None, "A mass is visible in the left lobe.", "A chest radiograph is shown", "a shadow near the left side"),
  (None, "A brain"),  # the article, or the option A?
  (None, "a. brain, probably"),  # a lower-case letter, and more than its option
  (None, "A-lines are seen", "B-mode image", "B's text", "C 3 is fractured", "I cannot tell", "Abdomen"),
  # Several letters, or a letter and another option's text.
  (None, "A, B", "A and B", "A/B", "(A) or (C)", "A) Chest B) Brain", "A) Chest\nB) Brain\nC) Left knee."),
  (None, "a) chest, b) brain", "B, not C.", "B) Chest"),
  ("B", "B. A mass is visible, I think"),  # an article and a pronoun
  # A stated answer, anywhere.
  ("B", "The answer is B.", "I think the answer is B", "**Answer:** (b)", "**Answer**: brain"),
  ("B", "The correct answer is: **B) Brain**", "The answer is B because A shows no gyri"),
  ("B", "The answer is B. Options A and C are wrong.", "Option A is wrong. The answer is B."),
  ("B", "The answer is B. Yes, the answer is B."),
  ("C", "Gyri are visible, so the correct option is C", "The answer is Left knee. It shows a patella."),
  ("A", "the answer is a", "the answer is a."),
  (None, "I think it is B", "The answer is a mass", "The answer is A mass", "The answer is not B"),
  (None, "The incorrect answer is A", "The wrong answer is A", "The answer is A or B", "The answer is A, B"),
  (None, "The answer is B. No, the answer is C.", "The answer is B) Chest", "The answer is D"),
)


def test_lenient_letter():
  assert_table(lambda text: rewards.lenient_letter(text, BRAIN), *LENIENT)


ORGANS = dataclasses.replace(BRAIN, options=("liver", "kidney", "spleen"))
UNREAD = (
  # An alternative, a condition, another option.
  r"\boxed{B} or C", "The answer is B, or perhaps the liver.", "The answer would be B, if it were a kidney.",
  "If it were round, the answer would be B", "The answer is kidney (C).", "the kidney or the spleen", "答案是B或C",
  "Answer:\nA. liver\nB. kidney\nC. spleen", '{"answer": ["A", "B"]}', "B?", "The answer is B or C",
  "The answer is B, the liver.", r"\boxed{A} or \boxed{B}", '{"answer": "A", "choice": "B"}', "B型肝炎",
  # A negation, before or behind.
  r"\boxed{B} is wrong", r"The answer is not \boxed{B}", "B) is not correct", "B) is not it", "B. This is incorrect.",
  "It is not B",
  "The answer is B, which is wrong.", "The answer is B. That is wrong.", "The least likely answer is B",
  "I don't think the answer is B.", "I would not choose B", "B. The answer is not B", '{"incorrect_answer": "B"}',
  "错误答案是B", "答案不是B", "不正解はB", "오답은 B", "Die falsche Antwort ist B", "La mauvaise réponse est B",
  "La respuesta incorrecta es B", "La risposta sbagliata è B", "A resposta errada é B", "Het foute antwoord is B",
  "неправильный ответ: B", "Đáp án sai: B", "الإجابة الخاطئة: B",
)  # fmt: skip
PLAIN = (
  "The answer is likely B", "The answer is most likely B.", "The answer is clearly B", "The answer is therefore B",
  "The answer has to be B", "The answer seems to be B", "The answer is the kidney.", "The answer is: the kidney",
  "the kidney", "kidney (B)", "B is the answer.", "Therefore, I choose B.", "It is B", "Choice: B", "Conclusion: B",
  "{'answer': 'B'}", '{"answer": ["B"]}', '{"correct_answer":"B"}', '{"finalAnswer":"B"}', '{"selected_option":"B"}',
  "<final_answer>B</final_answer>", "<answer>B</answer", r"\boxed{\textit{B}}", r"\fbox{B}", "Answer\n------\nB",
  "选B", "故选B。", "正确选项是B", "答：B", "La respuesta correcta es la B", "La réponse est la B", "Richtig ist B",
  "Het antwoord is B", "Đáp án: B", "الإجابة: B", r"The answer is \textbf{B}", "The answer is kidney (B).",
  r"The final answer is $\boxed{\text{B}}$.", r"\boxed{kidney}", "<answer>Ｂ</answer>", "<answer>\u200bB</answer>",
  '<answer type="choice">B</answer>', "Final answer - B", "答案是B。", "정답은 B입니다", "Ответ: B", "Réponse : B",
  # What is negated or named elsewhere does not matter.
  "There is no mass, so the answer is B.", "Since this is not the liver, the answer is B.", "No, the answer is B.",
  "The answer is B because the liver is not shown", "The answer is B. Options A and C are wrong.",
  "The answer is B: the heart is not enlarged", "A) is wrong, C) is wrong, so the answer is B.",
)  # fmt: skip


def test_plain_answers_are_read_and_those_in_doubt_are_not():
  assert_table(lambda text: rewards.lenient_letter(text, ORGANS), (None, *UNREAD), ("B", *PLAIN))


def test_options_decide_what_an_answer_means():
  for expected, text, options in (
    ("A", "A mass", ("mass", "cyst")),
    (None, "A mass", ("cyst", "mass")),
    (None, "A mass is visible", ("mass", "cyst")),  # a sentence again
    (None, "B: left knee", ("left knee", "left")),  # the other option's text
    ("B", "B: left", ("left knee", "left")),
    # Words do not tell these apart.
    ("B", "<answer>> 5 mm</answer>", ("< 5 mm", "> 5 mm")),
    (None, "<answer>5 mm</answer>", ("< 5 mm", "> 5 mm")),
    (None, "?", ("?", "+")),  # no word at all
    (None, "cyst", ("cyst", "mass", "cyst")),  # one of two
    ("B", "<answer>B</answer>", ("B", "A")),  # a letter first, as strictly
    # What negates or names another is part of the option.
    ("B", "The answer is no.", ("Yes", "No")),
    ("B", "B) Not visible.", ("Visible", "Not visible")),
    ("B", "The answer is viral pneumonia.", ("pneumonia", "viral pneumonia")),
    (None, "The answer is A, viral pneumonia.", ("pneumonia", "viral pneumonia")),
  ):
    example = dataclasses.replace(BRAIN, options=options, answer="B")
    assert rewards.lenient_letter(text, example) == expected, (text, options)


PIECES = st.sampled_from(
  ["<think>", "</think>", "<answer>", "</answer>", "The answer is ", "option ", "A", "B", "c", "D", "mass", "Brain"]
  + ["left knee", ".", ")", "(", ":", ", ", " ", "\n", "**", " or ", " is correct", "'", "-"]
)


@hypothesis.given(st.lists(PIECES, max_size=12).map("".join) | st.text(max_size=40))
@hypothesis.settings(max_examples=100, deadline=None, derandomize=True, database=None)
def test_the_forgiving_parser_reads_all_that_the_strict_one_reads(completion):
  strict, lenient = rewards.answer_letter(completion), rewards.lenient_letter(completion, BRAIN)
  assert lenient in ("A", "B", "C", None)
  if strict in ("A", "B", "C"):
    assert lenient == strict
  gold = rewards.lenient_letter(completion, dataclasses.replace(BRAIN, answer="C"))
  assert gold == lenient  # the answer does not help


def test_the_forgiving_parser_is_fast_on_repetition():
  start = time.process_time()
  for piece in ("(", "A ", "answer is ", "<think>", "answer: A, ", "\n", "**", "Brain ", "<answer>", "not "):
    rewards.lenient_letter(piece * 4000, BRAIN)
  assert time.process_time() - start < 5  # 0.3 s; a quadratic one took 12


def test_conventions():
  bracket = "<think>a</think><answer>(b)</answer>"
  for name, completion, accuracy, well_formed in (
    ("med_r1", RIGHT, 1, 1), ("med_r1", bracket, 0, 1), ("no_think", "<answer>A</answer>", 0, 1),
    ("no_think", RIGHT, 1, 0), ("lenient", bracket, 1, 1), ("lenient", "Brain", 1, 0),
    ("medvlm_r1", "<think>a</think><answer>B) Brain</answer>", 0.5, 1),
  ):  # fmt: skip
    found = rewards.CONVENTIONS[name]
    assert (found.accuracy(completion, BRAIN), found.format(completion, BRAIN)) == (accuracy, well_formed), name
