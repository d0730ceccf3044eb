"use strict";
(() => {
  // tables sort by the first number of a cell, or by its text
  const key = (row, column) => {
    const text = row.cells[column].textContent.trim();
    const number = parseFloat(text.replace(/,/g, "").replace(/^[<>+\s]+/, "").replace("−", "-"));
    return Number.isNaN(number) ? text : number;
  };
  for (const button of document.querySelectorAll("th button")) {
    button.addEventListener("click", () => {
      const heading = button.parentElement, column = heading.cellIndex, body = heading.closest("table").tBodies[0];
      const ascending = heading.getAttribute("aria-sort") !== "ascending";
      for (const other of heading.parentElement.cells) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      const rows = [...body.rows].map((row) => [key(row, column), row]);
      rows.sort(([a], [b]) => (typeof a === typeof b ? (a < b ? -1 : a > b ? 1 : 0) : typeof a === "number" ? -1 : 1) * (ascending ? 1 : -1));
      body.append(...rows.map(([, row]) => row));
    });
  }

  const { benchmarks, changes, models, words } = JSON.parse(document.getElementById("samples").textContent);
  const section = document.getElementById("browser"), form = section.querySelector("form"), shown = document.getElementById("sample");
  if (!benchmarks || !benchmarks.length) return;
  section.hidden = false;
  section.querySelector("h2").textContent = words.samples;
  const { benchmark, change, text, previous, next } = form.elements;
  for (const [label, word] of [[benchmark, words.benchmark], [change, words.change], [text, words.containing]]) label.parentElement.firstChild.textContent = `${word} `;
  previous.textContent = words.previous;
  next.textContent = words.next;
  const option = (value, label) => {
    const made = document.createElement("option");
    made.value = value;
    made.textContent = label;
    return made;
  };
  benchmark.append(...benchmarks.map((one) => option(one.name, one.label)));
  change.append(...changes.map((one) => option(one.name, one.label)));

  const add = (parent, tag, content, name) => {
    const made = document.createElement(tag);
    if (content !== undefined) made.textContent = content;
    if (name) made.className = name;
    parent.append(made);
    return made;
  };
  let matching = [], place = 0;
  const draw = () => {
    shown.replaceChildren();
    const own = benchmarks.find((one) => one.name === benchmark.value);
    const all = `${matching.length} ${words.here} ${own.counts[change.value]}`;
    document.getElementById("count").textContent = matching.length ? `${place + 1} / ${all}` : `${words.none} (${all})`;
    // disabled ones would lose the focus
    previous.setAttribute("aria-disabled", place <= 0);
    next.setAttribute("aria-disabled", place >= matching.length - 1);
    if (!matching.length) return;
    const sample = matching[place];
    add(shown, "h3", `${words.row} ${sample.row}`);
    add(shown, "h4", words.prompt);
    add(shown, "div", sample.prompt, "text");
    add(shown, "h4", words.gold);
    add(shown, "div", sample.gold, "text");
    const columns = add(shown, "div", undefined, "models");
    models.forEach((label, number) => {
      const answer = sample.answers[number];
      const column = add(columns, "section", undefined, answer.correct >= 0.5 ? "right" : "wrong");
      add(column, "h3", label);
      if (answer.text !== undefined) add(column, "div", answer.text, "text");
      else answer.choices.forEach(([choice, score], index) => {
        const line = add(column, "div", undefined, index === answer.chosen ? "text chosen" : "text");
        // what a text does to the direction of writing ends with it
        add(line, "bdi", choice);
        add(line, "span", ` (${score})`);
      });
    });
  };
  const filter = () => {
    const wanted = text.value.toLowerCase(), rule = changes.find((one) => one.name === change.value);
    matching = benchmarks.find((one) => one.name === benchmark.value).samples.filter((sample) => {
      const right = sample.answers.map((answer) => answer.correct);
      const kept = !rule.of || (rule.better ? right[rule.of[0]] > right[rule.of[1]] : right[rule.of[0]] < right[rule.of[1]]);
      const texts = [sample.prompt, sample.gold, ...sample.answers.flatMap((answer) => (answer.text !== undefined ? [answer.text] : answer.choices.map(([choice]) => choice)))];
      return kept && (!wanted || texts.some((one) => one.toLowerCase().includes(wanted)));
    });
  };
  // the address names what is shown, so that it can be passed on
  const save = () => history.replaceState(null, "", `#${new URLSearchParams({ benchmark: benchmark.value, change: change.value, text: text.value, place })}`);
  const read = () => {
    const given = new URLSearchParams(location.hash.slice(1));
    for (const field of [benchmark, change]) if ([...field.options].some((one) => one.value === given.get(field.name))) field.value = given.get(field.name);
    text.value = given.get("text") || "";
    filter();
    place = Math.max(0, Math.min(parseInt(given.get("place"), 10) || 0, matching.length - 1));
    draw();
  };
  const renew = () => { filter(); place = 0; draw(); save(); };
  const step = (by) => {
    if (place + by < 0 || place + by >= matching.length) return;
    place += by;
    draw();
    save();
  };
  for (const field of [benchmark, change, text]) field.addEventListener("input", renew);
  form.addEventListener("submit", (event) => event.preventDefault());
  previous.addEventListener("click", () => step(-1));
  next.addEventListener("click", () => step(1));
  document.addEventListener("keydown", (event) => {
    if (event.target.matches("input, select, .wide") || event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.key === "ArrowLeft" || event.key === "k") step(-1);
    if (event.key === "ArrowRight" || event.key === "j") step(1);
  });
  window.addEventListener("hashchange", read);
  read();
})();
