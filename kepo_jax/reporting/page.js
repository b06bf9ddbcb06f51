// Sorts tables and browses questions. Texts of models reach the page as text nodes and attribute values alone.
"use strict";

(() => {
  /** An element with attributes; strings among its children become text nodes. */
  function make(tag, attributes, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children.filter((child) => child !== null));
    return element;
  }

  // ---- tables ----

  /** The number with which a cell begins, "1,234 (56)" as 1234; NaN where it begins with none. */
  const leading = (text) => parseFloat(text.replace(/[,+\s]|^<\s*/g, ""));

  function sortable(table) {
    const body = table.tBodies[0];
    const written = [...body.rows];
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = make("button", { type: "button", title: "sort" }, head.textContent || "name");
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const values = written.map((row) => row.cells[column].textContent.trim());
        const numeric = values.some((value) => !Number.isNaN(leading(value)));
        // The first click on figures brings the largest to the top; a third one restores what was written.
        const turns = numeric ? ["descending", "ascending", ""] : ["ascending", "descending", ""];
        const turn = turns[(turns.indexOf(head.getAttribute("aria-sort") ?? "") + 1) % 3];
        heads.forEach((each) => each.removeAttribute("aria-sort"));
        if (turn) head.setAttribute("aria-sort", turn);
        const sign = turn === "descending" ? -1 : 1;
        const order = written.map((_, place) => place);
        if (turn) order.sort((a, b) => sign * compared(values[a], values[b], numeric) || a - b);
        // Rows without a figure stay at the end in both directions.
        if (turn && numeric) order.sort((a, b) => Number.isNaN(leading(values[a])) - Number.isNaN(leading(values[b])));
        body.append(...order.map((place) => written[place]));
      });
    });
  }

  function compared(one, other, numeric) {
    if (!numeric) return one.localeCompare(other, "en");
    return (leading(one) || 0) - (leading(other) || 0);
  }

  document.querySelectorAll("table.sortable").forEach(sortable);

  // ---- questions ----

  const root = document.getElementById("browser");
  if (!root) return;
  const { images, samples } = JSON.parse(document.getElementById("browser-data").textContent);

  const LONG = 700; // characters of a text from which on it is folded
  const FILTERS = [
    ["Source", (sample) => [sample.source]],
    ["Modality", (sample) => [sample.modality]],
    ["Question type", (sample) => [sample.question_type]],
    ["Outcome", (sample) => [sample.outcome, ...sample.tags]],
  ];

  /** All texts of a sample in lower case, made when a search first needs them. */
  const haystacks = new Map();
  function haystack(sample) {
    if (!haystacks.has(sample)) {
      const said = sample.groups.flatMap((group) => [group.hint, ...group.answers.flatMap((a) => [a.text, a.hint])]);
      haystacks.set(sample, [sample.id, sample.question, ...sample.options, ...said].join("\n").toLowerCase());
    }
    return haystacks.get(sample);
  }

  /** Values of a filter with their counts, those of whole samples before those of tags. */
  function choices(values) {
    const counts = new Map();
    for (const place of [0, 1]) {
      for (const sample of samples) {
        const found = values(sample);
        for (const value of place ? found.slice(1) : found.slice(0, 1)) {
          if (value) counts.set(value, (counts.get(value) ?? 0) + 1);
        }
      }
    }
    return counts;
  }

  let fields = 0;

  /** A control below its label. */
  function field(label, control, kind = "") {
    control.id = `browser-field-${(fields += 1)}`;
    return make("div", { class: `field ${kind}` }, make("label", { for: control.id }, label), control);
  }

  function filter([label, values]) {
    const select = make("select", {}, make("option", { value: "" }, "all"));
    const counts = choices(values);
    for (const [value, count] of counts) select.append(make("option", { value }, `${value} (${count})`));
    select.addEventListener("change", () => refresh());
    const element = field(label, select);
    element.hidden = counts.size < 2;
    return { element, select, values };
  }

  const filters = FILTERS.map(filter);
  const search = make("input", { type: "search", placeholder: "question, answer, hint, id", autocomplete: "off" });
  search.addEventListener("input", () => refresh());
  const reset = make("button", { type: "button", class: "plain" }, "Clear filters");
  reset.addEventListener("click", () => clear());

  const previous = make("button", { type: "button", class: "plain" }, "← Previous");
  const next = make("button", { type: "button", class: "plain" }, "Next →");
  const count = make("p", { role: "status", "aria-live": "polite" });
  const list = make("select", { size: "12" });
  const detail = make("div", { class: "detail" });
  previous.addEventListener("click", () => show(place - 1));
  next.addEventListener("click", () => show(place + 1));
  list.addEventListener("change", () => show(list.selectedIndex));

  let matches = [];
  let place = 0; // of the sample that is shown, among the matches

  /** Finds the matches anew and stays at the sample that was shown, where it is still one of them. */
  function refresh(wanted) {
    const shown = wanted ?? matches[place];
    const words = search.value.toLowerCase().trim();
    matches = samples.filter(
      (sample) =>
        filters.every(({ select, values }) => !select.value || values(sample).includes(select.value)) &&
        (!words || haystack(sample).includes(words)),
    );
    let group = null;
    list.replaceChildren();
    for (const sample of matches) {
      if (group?.label !== sample.source) list.append((group = make("optgroup", { label: sample.source })));
      const name = sample.id.split("/").pop();
      group.append(make("option", {}, [sample.outcome, name].filter(Boolean).join(" · ")));
    }
    reset.disabled = !search.value && filters.every(({ select }) => !select.value);
    show(Math.max(0, matches.indexOf(shown)));
  }

  function clear(wanted) {
    for (const { select } of filters) select.value = "";
    search.value = "";
    refresh(wanted);
  }

  function show(wanted) {
    if (wanted < 0 || (wanted && wanted >= matches.length)) return;
    place = wanted;
    const sample = matches[place];
    previous.disabled = place === 0;
    next.disabled = place >= matches.length - 1;
    const noun = matches.length === 1 ? "match" : "matches";
    count.textContent = `${sample ? `${place + 1} of ` : ""}${matches.length.toLocaleString("en")} ${noun}`;
    list.selectedIndex = sample ? place : -1;
    detail.replaceChildren(sample ? card(sample) : make("p", {}, "No question matches these filters."));
  }

  const tone = (outcome) => (/right$/.test(outcome) ? "good" : /wrong/.test(outcome) ? "bad" : "mixed");
  const chip = (text, kind = "") => make("span", { class: `chip ${kind}` }, text);

  function card(sample) {
    const chips = make("div", { class: "chips" }, chip(sample.outcome, tone(sample.outcome)));
    chips.append(...sample.tags.map((tag) => chip(tag, "note")));
    const details = sample.details.map((pair) => pair.join(" "));
    const facts = [sample.source, ...details, sample.modality, sample.question_type].filter(Boolean);
    chips.append(...facts.map((text) => chip(text)));
    const link = make("a", { href: `#question=${encodeURIComponent(sample.key)}` }, "link");
    return make(
      "article",
      {},
      chips,
      make("h3", { dir: "auto" }, sample.question),
      make("div", { class: "asked" }, ...sample.images.map(picture), options(sample)),
      make("p", { class: "identity" }, `${sample.id} · `, link),
      ...sample.groups.flatMap(answers),
    );
  }

  function picture([number, name]) {
    if (number < 0) return make("div", { class: "missing" }, "image not available", make("br", {}), name);
    const element = make("img", { src: images[number], alt: `image ${name}` });
    // Drawn images of few pixels stay crisp where they are enlarged.
    element.addEventListener("load", () => element.classList.toggle("small", element.naturalWidth <= 96));
    return element;
  }

  function options(sample) {
    const items = sample.options.map((option, number) => {
      const letter = String.fromCharCode(65 + number);
      const gold = letter === sample.answer;
      const parts = [make("span", { class: "letter" }, letter), make("span", { dir: "auto" }, option)];
      if (gold) parts.push(make("span", { class: "mark" }, "✓ right answer"));
      return make("li", gold ? { class: "gold" } : {}, ...parts);
    });
    return make("ol", { class: "options", "aria-label": "options" }, ...items);
  }

  function hint(text) {
    return text ? make("p", { class: "hint", dir: "auto" }, make("b", {}, "Hint "), text) : null;
  }

  function answers(group) {
    const shown = group.answers.length > 1 ? `${group.heading} (${group.answers.length})` : group.heading;
    const cards = group.answers.length ? make("div", { class: "answers" }, ...group.answers.map(answer)) : null;
    return [make("h4", {}, shown), hint(group.hint), cards].filter((part) => part !== null);
  }

  /** A text; of a long one its beginning and its end, where the answer stands, until all of it is asked for. */
  function said(text) {
    const element = make("p", { class: "said", dir: "auto" }, text || "(nothing)");
    if (text.length <= LONG) return [element];
    const toggle = make("button", { type: "button", class: "more", "aria-expanded": "true" });
    toggle.addEventListener("click", () => {
      const open = toggle.getAttribute("aria-expanded") === "false";
      toggle.setAttribute("aria-expanded", String(open));
      toggle.textContent = open ? "Show less" : `Show all ${text.length.toLocaleString("en")} characters`;
      element.textContent = open ? text : `${text.slice(0, LONG / 2 - 50)} […] ${text.slice(50 - LONG / 2)}`;
    });
    toggle.click();
    return [element, toggle];
  }

  function answer(each) {
    const kind = each.right === null ? "" : each.right ? "good" : "bad";
    const values = each.values.map((pair) => pair.join(" ")).join(" · ");
    const chips = make("div", { class: "chips" }, kind ? chip(each.right ? "✓ right" : "✗ wrong", kind) : null);
    chips.append(...each.marks.map((mark) => chip(mark, /^(not|talks|truncated)\b/.test(mark) ? "mixed" : "note")));
    const label = make("span", { class: "label" }, each.label);
    const top = make("div", { class: "top" }, label, make("span", { class: "values" }, values));
    return make("div", { class: `answer ${kind}` }, top, chips, hint(each.hint), ...said(each.text));
  }

  document.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: -1, ArrowRight: 1 };
    if (!(event.key in moves) || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
    // There the arrows already have a meaning.
    if (event.target.closest?.("input, select, textarea, .scroll, .paper")) return;
    event.preventDefault();
    show(place + moves[event.key]);
  });

  /** The sample that the address names, with the filters cleared so that it is there. */
  function linked() {
    const [, key] = location.hash.match(/^#question=(.*)$/) ?? [];
    const sample = key && samples.find((each) => encodeURIComponent(each.key) === key);
    if (!sample) return;
    clear(sample);
    root.scrollIntoView();
  }

  const controls = [...filters.map(({ element }) => element), field("Text", search, "search"), reset];
  root.append(
    make("div", { class: "filters" }, ...controls),
    make("div", { class: "steps" }, previous, count, next),
    make("div", { class: "pane" }, field("Questions that match", list, "matches"), detail),
    make("p", { class: "keys" }, "The keys ← and → show the question before and the one after."),
  );
  refresh();
  root.hidden = false;
  linked();
  window.addEventListener("hashchange", linked);
})();
