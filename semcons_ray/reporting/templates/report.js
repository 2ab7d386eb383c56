"use strict";
// The table of prompts. Texts go in by textContent only, so that nothing in them is ever markup.
(() => {
  const PAGE = 20, MANY = 6;
  const read = id => JSON.parse(document.getElementById(id).textContent);
  const data = read("prompt-data"), colours = read("client-colours");
  const $ = id => document.getElementById(id);
  const body = document.querySelector("#answers tbody");
  let page = 0;

  function make(tag, className, text) {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  }

  function option(select, value, text) {
    const element = make("option", "", text);
    element.value = value;
    select.append(element);
  }

  const fixed = value => value === null ? "–" : value.toFixed(2).replace("-", "−");
  const textOf = index => data.texts[index];
  const promptOf = row => data.prompts[row[0]] || null;

  function matches(row, needle, show, winner) {
    const [, , abstained, answers] = row;
    const chosen = answers.length ? answers[0][2] : -1;
    if (show === "labelled" && chosen < 0) return false;
    if (show === "abstained" && !abstained) return false;
    if (winner !== "" && chosen !== Number(winner)) return false;
    if (!needle) return true;
    const texts = [...(promptOf(row) || []), ...answers.map(answer => answer[0])];
    return texts.some(index => textOf(index).toLowerCase().includes(needle));
  }

  function clientChip(client) {
    const chip = make("span", "", String(client));
    const dot = make("i", "swatch");
    dot.style.background = colours[client] || "gray";
    chip.prepend(dot);
    return chip;
  }

  function answerLine([index, cosine, chosen, clients]) {
    const line = make("div", chosen >= 0 ? "answer chosen" : "answer");
    const said = make("div", "said", textOf(index));
    if (chosen >= 0) said.append(make("span", "badge", "✓ chosen, client " + chosen));
    const who = make("div", "who", clients.length === 1 ? "client" : clients.length + " clients");
    who.append(...clients.slice(0, 12).map(clientChip));
    if (clients.length > 12) who.append(" …");
    who.title = "clients " + clients.join(", ");
    line.append(make("div", "cosine", fixed(cosine)), said, who);
    return line;
  }

  function tableRow(row) {
    const [id, agreement, abstained, answers] = row;
    const prompt = promptOf(row);
    const line = make("tr");
    const asked = make("td");
    asked.append(make("div", "question", prompt ? textOf(prompt[0]) : "prompt " + id));
    if (prompt) asked.append(make("div", "reference", "Reference: " + textOf(prompt[1])));
    asked.append(make("div", "meta", "#" + id + (prompt && textOf(prompt[2]) ? " · " + textOf(prompt[2]) : "")));
    const given = make("td");
    given.append(...answers.slice(0, MANY).map(answerLine));
    if (answers.length > MANY) {
      const rest = make("details");
      rest.append(make("summary", "meta", (answers.length - MANY) + " more answers"), ...answers.slice(MANY).map(answerLine));
      given.append(rest);
    }
    if (!answers.length) given.append(make("div", "meta", "no answer"));
    const level = make("td");
    level.append(make("div", "level", fixed(agreement)));
    const bar = make("div", "bar"), fill = make("i");
    fill.style.width = 100 * Math.min(Math.max(agreement || 0, 0), 1) + "%";
    bar.append(fill);
    level.append(bar);
    if (abstained) level.append(make("div", "abstained", "abstained"));
    line.append(asked, given, level);
    return line;
  }

  function draw() {
    const round = data.rounds.find(item => String(item.round) === $("round").value);
    const needle = $("search").value.trim().toLowerCase();
    const found = round.rows.filter(row => matches(row, needle, $("show").value, $("winner").value));
    const sign = { low: 1, high: -1 }[$("order").value];
    if (sign) found.sort((a, b) => sign * ((a[1] ?? -2) - (b[1] ?? -2)));
    const pages = Math.max(1, Math.ceil(found.length / PAGE));
    page = Math.min(page, pages - 1);
    body.replaceChildren(...found.slice(page * PAGE, (page + 1) * PAGE).map(tableRow));
    $("count").textContent = found.length + " of " + round.rows.length + " prompts in round " + round.round;
    $("page").textContent = "page " + (page + 1) + " of " + pages;
    $("previous").disabled = page === 0;
    $("next").disabled = page === pages - 1;
  }

  function turn(by) {
    page += by;
    draw();
    document.getElementById("prompts").scrollIntoView();
  }

  for (const item of data.rounds) option($("round"), item.round, item.round);
  const winners = new Set(data.rounds.flatMap(item => item.rows.flatMap(row => row[3].map(answer => answer[2]))));
  for (const client of [...winners].filter(client => client >= 0).sort((a, b) => a - b)) option($("winner"), client, "client " + client);
  $("controls").addEventListener("input", () => { page = 0; draw(); });
  $("controls").addEventListener("submit", event => event.preventDefault());
  $("previous").addEventListener("click", () => turn(-1));
  $("next").addEventListener("click", () => turn(1));
  window.addEventListener("beforeprint", () => document.querySelectorAll(".folded details").forEach(item => { item.open = true; }));
  draw();
})();
