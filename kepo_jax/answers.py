"""Reads answers in several languages: letters and texts of options, boxes, JSON, sentences.

Ambiguous answers are not read: negations, alternatives, conditions, and other options void an answer.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence

# What may stand around a letter, as in "(B)", "**B**" and "'B'".
_OPENING = " \t\n\"'“‘`*_$([{<"
_ARTICLE = r"(?:the|la|el|los|las|le|les|die|der|das|de|het|il)\s+|l['’]"
_LEAD_IN = re.compile(
  rf"(?:{_ARTICLE})?(?:(?:answer|option|choice|letter|opci[óo]n|opção|opzione|letra|lettre|buchstabe|вариант)\b"
  rf"|选项|選項|選択肢)[{re.escape(_OPENING)}]*|(?:{_ARTICLE})(?=[A-J]\b)",
  re.IGNORECASE,
)
# A letter that begins no word: neither "Abdomen" nor "A-lines" nor "B's". Chinese and its relatives write no space
# beside a letter, so their signs are no part of a word here.
_WORD = r"[^\W\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3]"
_FIRST_LETTER = re.compile(rf"([A-J])(?!['’-]?{_WORD})", re.IGNORECASE)
# The same anywhere, in capitals; an "A" or "I" before a word is an article or a pronoun.
_OTHER_LETTER = re.compile(rf"(?<!{_WORD})(?<!{_WORD}['’-])(?:[B-HJ](?!['’-]?{_WORD})|[AI](?!['’-]?{_WORD}|\s+\w))")
_BECAUSE = (
  r"\b(?:because|since|as(?!\s+well)|based|given|due|weil|denn|porque|ya\s+que|car|parce|puisque|perch[ée]|poich[ée]"
  r"|omdat|потому|поскольку)\b|因为|因為"
)
# What ends an answer behind its letter: no word, a bracket or another mark, a line, "because", "is correct".
_ENDING = re.compile(
  r"\W*$|\s*[)\]}>:;,—–。、]|[\"'”’`*_$]*\.(?!\w)|[\"'”’`*_$]*[ \t]*\n|\s+-\s|\s+(?:option|choice)\b"
  r"|\s+is\s+(?:(?:the|my)\s+)?(?:correct|right|best|final)?\s*\b(?:answer|option|choice|(?<=correct)|(?<=right)|(?<=best))\b"
  rf"|\s*(?:{_BECAUSE})|\s*(?:选项|選項|です|입니다)",
  re.IGNORECASE,
)
# What states an answer: "the answer is", "would be", a colon, a dash, a heading on a line of its own, "I choose".
_STATEMENT = re.compile(
  r"(?:(?:\b(?:answer|(?:correct|right|best|final|likely|my)\s+(?:option|choice)|respuesta(?:\s+correcta)?"
  r"|opci[óo]n\s+correcta|r[ée]ponse(?:\s+(?:correcte|exacte))?|antwort|richtig(?=\s+ist\b)|resposta(?:\s+correta)?"
  r"|risposta(?:\s+(?:corretta|esatta))?|antwoord|đáp\s+án(?:\s+đúng)?|câu\s+trả\s+lời|ответ|الإجابة(?:\s+الصحيحة)?|الجواب)"
  r"|答案|答え|正解|正确选项|正確選項|정답|[答답](?=\s*:))[*_]*\s*"
  r"(?:(?:is|was|(?:has|seems|appears)\s+to\s+be|(?:would|should|must|will|can|could|may|might)\s+be"
  r"|es|est|ist|lautet|é|è|là|هي|هو)\b(?:[,\s]+(?:most\s+likely|likely|(?:most\s+)?probably|clearly|therefore|thus|hence"
  r"|definitely|certainly|obviously|indeed)\b,?){0,2}\s*:?|[是为為は은는]\s*:?|:|\s[-–—]\s|\n(?:[-=]{2,}[ \t]*\n)?)"
  r"|(?:\A|\n)\W{0,8}(?:choice|option|conclusion|selection)[*_]*\s*:"
  r"|(?:\A|[.!?\n])\s{0,4}(?:(?:so|thus|therefore|hence)\b,?\s+)?it(?:['’]s|\s+is)\b"
  r"|\bI(?:['’](?:ll|d)|\s+(?:will|would|therefore|thus|hence|must))?\s+(?:choose|chose|select|pick|go\s+(?:with|for))\b"
  r"|[选選][择擇]?\s*:?(?=\s*[A-J]))[*_]*\s*",
  re.IGNORECASE,
)
_WRONG = (
  r"\b(?:(?:not|n['’]t)\s+(?:correct|right|true|the\s+answer)|wrong|incorrect\w*|false|mistaken|falsch\w*|equivocad\w+"
  r"|err[óo]ne\w+|faux|fausse|mauvais\w*|errad\w+|sbagliat\w+|errat[ao]|scorrett\w+|неправильн\w+|неверн\w+|ошибочн\w+"
  r"|onjuist\w*|foute?|verkeerd\w*|sai)\b|n['’]t\s+(?:correct|right)\b|خطأ|خاطئ|[错錯误誤]|不对|不對|不正|間違|틀린|틀렸|오답"
)
_NOT = (
  rf"{_WRONG}|\b(?:not|never|neither|nor|none|cannot|least|unlikely|doubt\w*|nicht|kein\w*|nie|tampoco|pas|non(?!-)|não|не"
  r"|niet|geen|không|ليس\w*|غير)\b|\bno\b(?!\s*,)|n['’]t\b|[不非]|아니|않|ない"
)
_IF = r"\b(?:if|unless|wenn|sofern|si|se|если|indien|nếu|إذا|لو)\b|如果|假如|若|もし|만약"
_OR = (
  r"\b(?:or|either|perhaps|maybe|possibly|but|though|although|however|except|versus|vs|instead|oder|vielleicht|aber|ou|o|u"
  r"|quiz[áa]s?|pero|mais|peut-être|mas|talvez|ma|forse|или|возможно|но|misschien|maar|hoặc|nhưng|أو|ربما|لكن)\b"
  r"|或|可能|也许|但|または|かも|또는|아마|하지만"
)
_NEGATED = re.compile(_NOT, re.IGNORECASE)
_CONDITION = re.compile(_IF, re.IGNORECASE)
# Behind an answer: soon a negation, somewhere in its sentence an alternative; or the next sentence takes it back.
_AT_ONCE_NEGATED = re.compile(rf"[^\w,;:—–]*(?:[^\W\d]+\s+){{0,2}}?(?:{_NOT})", re.IGNORECASE)
_DOUBT = re.compile(
  rf"{_WRONG}|{_IF}|{_OR}|[,;:—–-]\s*(?:and\s+)?(?:{_NOT})|\bwhich\s+(?:is|was|seems)\s*(?:not\b|n['’]t)", re.IGNORECASE
)
_TAKEN_BACK = re.compile(
  r"\W*(?:(?:wait|no|but|actually|however|hmm|sorry)\b\W*)*(?:(?:this|that|it|das|dies|esto|eso|cela|questo|isso|это|dat|dit)"
  rf"\b|c['’]|[这這那]|これ|それ|이것)?[^\w]*(?:\w+\s+){{0,2}}?(?:{_WRONG})|\W*no\W*$",
  re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.!?。;](?!\d)|\n")
_REASON = re.compile(_BECAUSE, re.IGNORECASE)
# What comes before a conclusion does not negate it.
_SO = re.compile(
  rf"\b(?:so|therefore|thus|hence|also|daher|donc|por\s+(?:lo\s+)?tanto|quindi|portanto|поэтому|dus)\b|所以|因此|故|따라서"
  rf"|^\W*(?:{_BECAUSE})[^,]*,",
  re.IGNORECASE,
)
_OPENED = re.compile(r"<(?:final[_ -]?)?answer(?:\s[^<>]*)?>", re.IGNORECASE)
_CLOSED = re.compile(r"</(?:final[_ -]?)?answer\b", re.IGNORECASE)
_TAG = re.compile(r"</?(?:final[_ -]?)?answer(?:\s[^<>]*)?>?", re.IGNORECASE)
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_COMMAND = re.compile(r"\\[a-zA-Z]+\s*\{([^{}]*)\}")
_JSON_FIELD = re.compile(
  r"[\"'](?:(?:final|correct|selected|chosen|best|predicted)[_ ]?)?(?:answer|choice|option|letter)[\"']\s*:\s*"
  r"(?P<list>\[\s*)?(?:\"(?P<double>[^\"]*)\"|'(?P<single>[^']*)')(?(list)\s*\])",
  re.IGNORECASE,
)


def option_letter(text: str, options: Sequence[str]) -> str | None:
  """Returns the letter of the option that a text answers with, None where it names none or is ambiguous.

  See `rewards.lenient_letter`.
  """
  return _Reader([_plain_signs(option) for option in options]).letter(_plain_signs(text))


def named_letters(text: str) -> set[str]:
  """Returns the letters of options that a text names; an "A" or "I" before a word is an article or a pronoun."""
  return {*_OTHER_LETTER.findall(text)}


class _Reader:
  """Reads answers to a question with some options."""

  def __init__(self, options: Sequence[str]):
    self._options = {chr(ord("A") + i): option for i, option in enumerate(options)}
    self._texts = {letter: _plain(option) for letter, option in self._options.items()}

  def letter(self, text: str) -> str | None:
    """Returns the letter that a completion answers with."""
    content = _TAG.sub(" ", _answer_block(text)).strip()
    if letter := self._option_of(content):
      return letter
    if _BOXED.search(content):
      return _only(self._boxed(*box) for box in _in_context(_BOXED, content))
    if fields := [match["double"] or match["single"] or "" for match in _JSON_FIELD.finditer(content)]:
      return _only(map(self._named, fields))
    content = _without_commands(content)
    stated = {self._stated(before, after) for _, before, after in _in_context(_STATEMENT, content)} - {None}
    return _only(stated - {""}) if stated else self._leading(content)

  def _boxed(self, match: re.Match[str], before: str, after: str) -> str | None:
    letter = self._named(_without_commands(match[1]))
    return None if letter is None or self._doubted(before, letter, after) else letter

  def _named(self, text: str) -> str | None:
    """Returns the option that a short text names: its letter, its own text, or both."""
    return self._option_of(text) or self._leading(text)

  def _option_of(self, text: str) -> str | None:
    """Returns the letter of the option that a text equals, maybe with an article, `the x`, or its letter, `x (B)`.

    Where signs alone tell options apart, "< 5" and "> 5", they count.
    """
    plain = _plain(text)
    same = [letter for letter in self._texts if plain and self._texts[letter] == plain]
    if len(same) > 1:
      same = [letter for letter in same if self._options[letter].strip().casefold() == text.strip().casefold()]
    if same or not plain:
      return same[0] if len(same) == 1 else None
    letter, rest = self._text_first(text)
    return letter if letter and _plain(rest) in ("", letter.lower()) else None

  def _stated(self, before: str, after: str) -> str | None:
    """Returns the option that follows "the answer is", "" where it is negated or in doubt, None where none follows."""
    letter, rest = self._object(after)
    if letter is None:
      letter, rest = self._option_of(_SENTENCE_END.split(after, maxsplit=1)[0]), ""
    if letter is None:
      return "" if _AT_ONCE_NEGATED.match(after) else None
    return "" if self._doubted(before, letter, rest) else letter

  def _object(self, text: str) -> tuple[str | None, str]:
    """Returns the option with which a text begins, by its letter or its text, and the rest."""
    letter, rest = self._first_letter(text)
    if letter and (end := _end_of(rest, self._texts[letter])):
      return letter, rest[end:]
    others = [other for other in self._texts if other != letter]
    if letter and _ENDING.match(rest) and not any(_end_of(rest, self._texts[other]) for other in others):
      return letter, rest
    return (None, "") if letter and _ENDING.match(rest) else self._text_first(text)

  def _text_first(self, text: str) -> tuple[str | None, str]:
    """Returns the option with whose words a text begins, the longest of several, and the rest."""
    text = re.sub(rf"^\W*(?:{_ARTICLE})", "", text, flags=re.IGNORECASE) if text else text
    texts = {letter: re.sub(rf"^(?:{_ARTICLE})", "", own) for letter, own in self._texts.items()}
    longest = max((own for own in texts.values() if _end_of(text, own)), key=len, default=None)
    same = [letter for letter, own in texts.items() if own == longest]
    return (same[0], text[_end_of(text, longest) :]) if longest and len(same) == 1 else (None, "")

  def _leading(self, content: str) -> str | None:
    """Returns the letter that a text begins with, None where it may be a word or is one of several."""
    letter, rest = self._first_letter(content)
    named, behind = self._object(content)
    if letter is None or named != letter or self._others(letter, rest) or self._doubted("", letter, behind):
      return None
    capital = content[len(content) - len(rest) - 1].isupper()
    return letter if capital or _plain(rest) in ("", self._texts[letter]) else None

  def _first_letter(self, text: str) -> tuple[str | None, str]:
    """Returns the letter of an option with which a text begins, behind marks and "option", and the rest."""
    text = text.lstrip(_OPENING)
    text = text[lead.end() :] if (lead := _LEAD_IN.match(text)) else text
    match = _FIRST_LETTER.match(text)
    if match is None or match.group(1).upper() not in self._texts:
      return None, ""
    return match.group(1).upper(), text[match.end() :]

  def _doubted(self, before: str, letter: str, after: str) -> bool:
    """Tells whether the text around an answer takes it back, makes it conditional, or names another option."""
    lead = _SENTENCE_END.split(before)[-1]
    if _CONDITION.search(lead) or _NEGATED.search(_SO.split(lead)[-1]):
      return True
    sentence, *further = _SENTENCE_END.split(after)
    claim = _REASON.split(sentence, maxsplit=1)[0]
    following = next((text for text in further if text.strip()), "")
    listed = re.match(rf"[^\n]*\n\W*{chr(ord(letter) + 1)}\s?[).:\]]", after)  # all options, as in the question
    question = after.lstrip(_OPENING + ")]}>").startswith("?")
    return bool(
      question
      or listed
      or _AT_ONCE_NEGATED.match(claim)
      or _DOUBT.search(claim)
      or _TAKEN_BACK.match(following)
      or self._others(letter, sentence)
      or self._mentioned(claim) - {letter}
    )

  def _others(self, letter: str, text: str) -> set[str]:
    """Returns the letters of other options that a text names."""
    return (named_letters(text) & self._texts.keys()) - {letter}

  def _mentioned(self, text: str) -> set[str]:
    """Returns the options whose texts stand in a text; of two at one place the longer."""
    words, letters = f" {_plain(text)} ", set()
    for letter, own in sorted(self._texts.items(), key=lambda item: -len(item[1])):
      if own and f" {own} " in words:
        letters.add(letter)
        words = words.replace(f" {own} ", " | ")
    return letters


def _only(readings) -> str | None:
  """Returns the letter that all readings agree on, None if they do not."""
  letters = {*readings}
  return letters.pop() if len(letters) == 1 else None


def _in_context(pattern: re.Pattern[str], text: str) -> Iterator[tuple[re.Match[str], str, str]]:
  """Yields each match with the text back to the match before it, and on to the one after."""
  matches = [*pattern.finditer(text)]
  for i, match in enumerate(matches):
    after = matches[i + 1].start() if i + 1 < len(matches) else len(text)
    yield match, text[matches[i - 1].end() if i else 0 : match.start()], text[match.end() : after]


def _answer_block(text: str) -> str:
  """Returns the first answer block, else what follows the last think block; nothing of a think block that is open."""
  if (opened := _OPENED.search(text)) and (closed := _CLOSED.search(text, opened.end())):
    return text[opened.end() : closed.start()]
  content = re.split("</think>", text, flags=re.IGNORECASE)[-1]
  return re.split("<think>", content, flags=re.IGNORECASE)[0]


def _without_commands(text: str) -> str:
  """Removes LaTeX's commands around words, as in `\\textbf{\\text{B}}`."""
  return _COMMAND.sub(r"\1", _COMMAND.sub(r"\1", text))


def _plain_signs(text: str) -> str:
  """Replaces full-width and other compatible signs by plain ones, and removes invisible ones."""
  if text.isascii():
    return text
  return "".join(sign for sign in unicodedata.normalize("NFKC", text) if unicodedata.category(sign) != "Cf")


def _plain(text: str) -> str:
  return " ".join(re.findall(r"\w+", text.casefold()))


def _end_of(text: str, option: str) -> int:
  """Returns where an option ends that begins a text, 0 unless a mark, a line, "because" or nothing follows it."""
  words = r"\W+".join(map(re.escape, option.split()))
  match = words and re.match(rf"\W*{words}(?=\s*(?:[^\w\s]|$)|[ \t]*\n|\s+(?:{_BECAUSE}))", text, re.IGNORECASE)
  return match.end() if match else 0
