"use strict";
(async () => {
  const $ = (id) => document.getElementById(id);
  // Whatever the data hold becomes text: never markup, an attribute that loads something, or code.
  const make = (name, properties = {}, ...children) => {
    const element = Object.assign(document.createElement(name), properties);
    element.append(...children.filter((child) => child !== null));
    return element;
  };
  const said = (text) => make("p", { className: "said", dir: "auto", textContent: text.toWellFormed?.() ?? text, tabIndex: 0 });

  const packed = Uint8Array.from(atob($("data").textContent), (c) => c.charCodeAt(0));
  $("data").textContent = "";
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const data = JSON.parse(await new Response(stream).text());
  const { metrics, agents, rows, answers, pictures } = data;
  const SETS = { in: "In-Test", out: "Out-Test" };
  const PAGE = 20;
  const ALL = metrics.length; // the place of Overall behind the metrics

  // scores[agent][row] holds the ratio of each metric and their mean; NaN where there is none.
  const scores = answers.map((list) => list.map((answer) => {
    const ratios = metrics.map((_, i) => {
      const [a, b, , note] = answer ? answer[1][i] : [null, null, "", "missing"];
      return a === null || !(b > 1e-6) ? NaN : a / b;
    });
    const valid = ratios.filter((ratio) => !Number.isNaN(ratio));
    ratios.push(valid.length ? valid.reduce((sum, ratio) => sum + ratio, 0) / valid.length : NaN);
    return ratios;
  }));
  const searchable = rows.map((row, i) => [
    row.id, row.prompt, row.reference, ...answers.flatMap((list) => list[i] ? [list[i][0], ...list[i][1].map((review) => review[2])] : []),
  ].join("\n").toLowerCase());
  const link = (row) => "#row=" + [row.split, row.kind, row.id].map((part) => encodeURIComponent(part.toWellFormed?.() ?? part)).join("/");
  const places = new Map(rows.map((row, i) => [link(row), i]));
  const number = (value) => Number.isNaN(value) ? "–" : value.toFixed(3);
  const signed = (value) => Number.isNaN(value) ? "–" : (value < 0 ? "" : "+") + value.toFixed(3);

  const form = $("filters");
  const field = form.elements;
  const fill = (select, options) => select.append(...options.map(([value, text]) => make("option", { value, textContent: text })));
  const distinct = (name) => [...new Set(rows.map((row) => row[name]))];
  fill(field.first, agents.map((agent, i) => [i, agent.name]));
  fill(field.second, agents.map((agent, i) => [i, agent.name]));
  fill(field.metric, [[ALL, "Overall"], ...metrics.map((name, i) => [i, name])]);
  fill(field.split, [["", "all"], ...distinct("split").map((name) => [name, SETS[name] ?? name])]);
  fill(field.kind, [["", "all"], ...distinct("kind").map((name) => [name, name])]);
  fill(field.character, [["", "all"], ...distinct("character").sort().map((name) => [name, name])]);
  if (agents.length > 1) field.second.options[1].defaultSelected = true;
  const shown = new Set(); // agents whose answers are open beside the two chosen ones
  let order = [];
  let page = 0;
  let open = null;

  function filter() {
    const [first, second, metric] = [field.first, field.second, field.metric].map((select) => Number(select.value));
    const score = (agent) => (i) => scores[agent][i][metric];
    const [mine, other] = [score(first), score(second)];
    const [least, most] = [field.least, field.most].map((input) => input.value === "" ? null : Number(input.value));
    const text = field.text.value.trim().toLowerCase();
    order = rows.map((_, i) => i).filter((i) =>
      (!field.split.value || rows[i].split === field.split.value) &&
      (!field.kind.value || rows[i].kind === field.kind.value) &&
      (!field.character.value || rows[i].character === field.character.value) &&
      (least === null || mine(i) >= least) && (most === null || mine(i) <= most) &&
      (!text || searchable[i].includes(text)));
    const key = { worst: mine, best: (i) => -mine(i), behind: (i) => mine(i) - other(i), ahead: (i) => other(i) - mine(i) }[field.sort.value];
    if (key) { // rows without a number come last
      const keys = new Map(order.map((i) => [i, key(i)]));
      order.sort((i, j) => Number.isNaN(keys.get(i)) - Number.isNaN(keys.get(j)) || keys.get(i) - keys.get(j) || i - j);
    }
    page = 0;
    list();
  }

  function list() {
    const [first, second, metric] = [field.first, field.second, field.metric].map((select) => Number(select.value));
    const pages = Math.max(1, Math.ceil(order.length / PAGE));
    $("found").textContent = `${order.length} of ${rows.length} rows`;
    $("page").textContent = `page ${page + 1} of ${pages}`;
    $("previous").disabled = page === 0;
    $("next").disabled = page + 1 >= pages;
    $("head-first").textContent = agents[first].name;
    $("head-second").textContent = agents[second].name;
    $("rows").tBodies[0].replaceChildren(...order.slice(page * PAGE, (page + 1) * PAGE).map((i) => {
      const row = rows[i];
      const [mine, other] = [scores[first][i][metric], scores[second][i][metric]];
      return make("tr", { className: i === open ? "open" : "", onclick: () => { location.hash = link(row); } },
        make("th", { scope: "row" }, make("a", { href: link(row), textContent: row.id })),
        make("td", { className: "text minor", dir: "auto", textContent: row.character }),
        make("td", { className: "text minor", textContent: SETS[row.split] ?? row.split }),
        make("td", { className: "text minor", textContent: row.kind }),
        ...[number(mine), number(other), signed(mine - other)].map((text) => make("td", { textContent: text })));
    }));
  }

  function card(agent, i, chosen) {
    const answer = answers[agent][i];
    const found = make("div", { className: chosen ? "card chosen" : "card" },
      make("h4", { textContent: `${agents[agent].name} · ${number(scores[agent][i][ALL])}` }));
    if (!answer) found.append(make("p", { className: "none", textContent: "no such row" }));
    else {
      found.append(answer[0] ? said(answer[0]) : make("p", { className: "none", textContent: "no answer" }));
      metrics.forEach((name, j) => {
        const [a, b, review, note] = answer[1][j];
        if (!review && a === null && !answer[0]) return;
        found.append(make("details", {},
          make("summary", {}, make("span", { textContent: name }), make("span", { textContent: a === null ? "–" : `${a} : ${b}` })),
          note ? make("p", { className: "none", textContent: note }) : null,
          review ? said(review) : null));
      });
    }
    return found;
  }

  function detail() {
    const i = places.get(location.hash);
    if (i === undefined) return;
    open = i;
    const row = rows[i];
    const chosen = [Number(field.first.value), Number(field.second.value)];
    const parts = row.prompt.split("\n\n\n");
    const picture = pictures[row.picture];
    const others = agents.map((_, agent) => agent).filter((agent) => !chosen.includes(agent));
    const cards = make("div", { className: "cards" });
    const draw = () => cards.replaceChildren(
      make("div", { className: "card" }, make("h4", { textContent: "Reference" }), said(row.reference)),
      ...[...new Set(chosen)].map((agent) => card(agent, i, true)),
      ...others.filter((agent) => shown.has(agent)).map((agent) => card(agent, i, false)));
    draw();
    const boxes = others.map((agent) => make("label", {}, make("input", {
      type: "checkbox", checked: shown.has(agent),
      onchange: (event) => { shown[event.target.checked ? "add" : "delete"](agent); draw(); },
    }), agents[agent].name));
    $("row").replaceChildren(
      make("h3", { dir: "auto", tabIndex: -1 }, `${row.character} · ${row.kind} · ${SETS[row.split] ?? row.split} `, make("a", { href: link(row), textContent: "link to this row" })),
      make("div", { className: "top" },
        picture ? make("img", { src: picture, alt: `picture ${row.picture}` }) : make("p", { className: "none", textContent: `picture ${row.picture || "unnamed"} was not at hand` }),
        make("div", {},
          make("p", { className: "none", textContent: [row.id, row.script, row.category, row.language].join(" · ") }),
          said(parts[parts.length - 1]),
          parts.length > 1 ? make("details", {}, make("summary", { textContent: "The whole prompt, with the profile" }), ...parts.slice(0, -1).map(said)) : null)),
      boxes.length ? make("fieldset", {}, make("legend", { textContent: "More agents" }), ...boxes) : "",
      cards);
    $("row").hidden = false;
    list();
  }

  let waiting = 0;
  form.addEventListener("input", () => { cancelAnimationFrame(waiting); waiting = requestAnimationFrame(() => { filter(); detail(); }); });
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(() => { filter(); detail(); }));
  $("previous").addEventListener("click", () => { page -= 1; list(); });
  $("next").addEventListener("click", () => { page += 1; list(); });
  const go = () => { detail(); if (places.has(location.hash)) { $("row").scrollIntoView(); $("row").firstChild.focus({ preventScroll: true }); } };
  addEventListener("hashchange", go);
  filter();
  go();
  document.documentElement.dataset.ready = "yes";
})();
