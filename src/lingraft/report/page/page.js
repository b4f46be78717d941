"use strict";
(() => {
  const root = document.documentElement;
  root.classList.add("js");
  const at = (id) => document.getElementById(id);
  const on = (node, event, does) => node && node.addEventListener(event, does);
  const island = (id) => JSON.parse(at(id).textContent);
  const say = (text) => { at("toast").textContent = text; clearTimeout(say.timer); say.timer = setTimeout(() => { at("toast").textContent = ""; }, 4000); };

  // Theme: the system's until the reader chooses; remembered for the session where that is allowed.
  const recall = () => { try { return sessionStorage.getItem("lingraft-theme"); } catch { return null; } };
  const keep = (theme) => { try { sessionStorage.setItem("lingraft-theme", theme); } catch { /* Refused: it holds until the page is left. */ } };
  const system = matchMedia("(prefers-color-scheme: dark)");
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const pressed = () => at("theme").setAttribute("aria-pressed", String(dark()));
  const remembered = recall();
  if (remembered === "dark" || remembered === "light") root.dataset.theme = remembered;
  pressed();
  on(system, "change", pressed);
  on(at("theme"), "click", () => { root.dataset.theme = dark() ? "light" : "dark"; keep(root.dataset.theme); pressed(); });

  // What is packed.
  const TOO_OLD = "This browser cannot unpack the data of this page (DecompressionStream is missing). A newer browser can.";
  const unpack = async (text) => {
    if (typeof DecompressionStream === "undefined") throw new Error(TOO_OLD);
    const letters = atob(text), bytes = new Uint8Array(letters.length);
    for (let n = 0; n < letters.length; n++) bytes[n] = letters.charCodeAt(n);
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
  };
  const save = (name, text, type) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type }));
    link.download = name;
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    say(`${name} was saved`);
  };
  let files = null;
  document.addEventListener("click", async (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    try {
      if (button.dataset.file) {
        files = files || await unpack(island("files-data").gzip);
        save(button.dataset.file, files[button.dataset.file], button.dataset.file.endsWith(".csv") ? "text/csv" : "text/plain");
      } else if (button.dataset.copy !== undefined || button.dataset.copyFrom) {
        const text = button.dataset.copy === undefined ? at(button.dataset.copyFrom).textContent : button.dataset.copy;
        await navigator.clipboard.writeText(text);
        say("Copied");
      }
    } catch (error) {
      say(button.dataset.file ? error.message : "The browser did not allow copying: select the text instead");
    }
  });

  // What a mark or a cell says, beside the pointer. Tables say the same to those who have no pointer.
  const tip = at("tip");
  on(document, "pointermove", (event) => {
    const told = event.target.closest && event.target.closest("[data-tip]");
    tip.hidden = !told;
    if (!told) return;
    if (tip.textContent !== told.dataset.tip) tip.textContent = told.dataset.tip;
    const { offsetWidth: width, offsetHeight: height } = tip;
    tip.style.left = `${Math.max(8, Math.min(event.clientX + 14, innerWidth - width - 8))}px`;
    tip.style.top = `${event.clientY + height + 22 > innerHeight ? event.clientY - height - 12 : event.clientY + 16}px`;
  });
  on(document, "scroll", () => { tip.hidden = true; });
  on(document, "keydown", (event) => { if (event.key === "Escape") tip.hidden = true; });

  // The section that is read, in the navigation.
  const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
  const current = (id) => { for (const [name, link] of links) name === id ? link.setAttribute("aria-current", "true") : link.removeAttribute("aria-current"); };
  let aimed = null;
  for (const [id, link] of links) on(link, "click", () => {
    aimed = id;
    current(id);
    // What comes to be seen on the way takes the room that it needs only then: the place is looked for again.
    const again = (times) => times && requestAnimationFrame(() => { at(id).scrollIntoView(); again(times - 1); });
    again(3);
  });
  for (const kind of ["wheel", "touchmove", "keydown"]) on(document, kind, () => { aimed = null; });
  if ("IntersectionObserver" in window) {
    const seen = new Set();
    const watch = new IntersectionObserver((entries) => {
      for (const entry of entries) entry.isIntersecting ? seen.add(entry.target.id) : seen.delete(entry.target.id);
      // The last sections never come to the top: who asked for one is shown that one.
      if (!aimed) current([...links.keys()].find((id) => seen.has(id)));
    }, { rootMargin: "-80px 0px -60% 0px" });
    for (const id of links.keys()) watch.observe(at(id));
  }

  // Many drawings: the first of them, until all are asked for; trainings by kind and language.
  const kind = at("training-kind"), language = at("training-language");
  const asked = (figure) => !(figure.dataset.kind && kind && ((kind.value && figure.dataset.kind !== kind.value) || (language.value && figure.dataset.language !== language.value)));
  const sifts = [...document.querySelectorAll("[data-most]")].map((grid) => {
    const all = [...grid.children], most = Number(grid.dataset.most), more = document.createElement("button");
    let open = false;
    more.type = "button";
    more.className = "more";
    const sift = () => {
      const wanted = all.filter(asked);
      for (const figure of all) figure.hidden = true;
      for (const figure of open ? wanted : wanted.slice(0, most)) figure.hidden = false;
      more.hidden = wanted.length <= most;
      more.setAttribute("aria-expanded", String(open));
      more.textContent = open ? `Show the first ${most} only` : `Show all ${wanted.length}`;
      if (grid.id === "training-grid" && kind) at("training-count").textContent = `${wanted.length} of ${all.length}`;
    };
    grid.after(more);
    on(more, "click", () => { open = !open; sift(); });
    on(window, "beforeprint", () => { open = true; sift(); });
    sift();
    return sift;
  });
  for (const control of [kind, language]) on(control, "change", () => sifts.forEach((sift) => sift()));

  // The atlas, layer by layer.
  on(at("layer"), "change", () => {
    const { most, cosines } = island("atlas-data"), layer = at("layer");
    const rows = cosines[layer.value];
    [...at("cosines").tBodies[0].rows].forEach((row, i) => [...row.cells].slice(1).forEach((cell, j) => {
      const value = rows[i][j];
      if (i === j) return;
      cell.textContent = value === null ? "–" : value.toFixed(2).replace("-0.00", "0.00").replace("-", "−");
      cell.className = value === null ? "none" : `signed-${4 + Math.round(4 * Math.max(-1, Math.min(1, value / (most || 1))))}`;
    }));
    at("layer-says").textContent = `The table shows ${layer.selectedOptions[0].textContent}`;
  });

  // Examples.
  if (!at("examples-data")) return;
  const PAGE = 20, LONG = 900;
  let given = null, lower = null, found = [], first = 0;
  const right = (answer, n) => answer.value[n] >= 0.5;
  // Figures between right and wrong, as of ROUGE-L, are said.
  const judged = ({ right, value }) => (right ? "✓ right" : "✗ wrong") + (value === 0 || value === 1 ? "" : ` (${(100 * value).toFixed(1)})`);
  const make = (name, className, text) => {
    const node = document.createElement(name);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const foreign = (node, code, text) => { node.dir = "auto"; node.lang = given.tags[code]; node.textContent = text; return node; };
  const chosen = () => (at("ex-language").value ? [at("ex-language").value] : given.languages);
  const wanted = () => {
    const mode = at("ex-mode").value, x = at("ex-right").value, y = at("ex-wrong").value, query = at("ex-search").value.trim().toLowerCase();
    let hits = null;
    if (query) {
      lower = lower || given.strings.map((text) => text.toLowerCase());
      hits = lower.map((text) => text.includes(query));
    }
    const list = [];
    for (const code of chosen()) {
      const items = given.items[code];
      if (!items) continue;
      const answers = Object.entries(items.answers), numbers = mode === "differ" ? given.differ[code] || [] : items.id.keys();
      for (const n of numbers) {
        if (mode === "pair") {
          const one = items.answers[x], other = items.answers[y];
          if (!one || !other || one.answer[n] < 0 || other.answer[n] < 0 || !right(one, n) || right(other, n)) continue;
        }
        if (hits && !hits[items.prompt[n]] && !hits[items.gold[n]] && !items.id[n].toLowerCase().includes(query)
          && !answers.some(([, a]) => hits[a.answer[n]] || hits[a.reason[n]] || hits[a.prompt[n]])) continue;
        list.push([code, n]);
      }
    }
    return list;
  };
  const words = (index) => (index >= 0 ? given.strings[index] : "");
  const title = (name) => { const option = at("ex-right").querySelector(`option[value="${CSS.escape(name)}"]`); return option ? option.textContent : name; };
  const prompt = (code, text) => {
    if (text.length <= LONG) return foreign(make("p", "prompt"), code, text);
    const box = make("details", "long"), summary = make("summary");
    foreign(summary, code, `${text.slice(0, 300)}…`);
    box.append(summary, foreign(make("p", "prompt"), code, text));
    return box;
  };
  const card = ([code, n]) => {
    const items = given.items[code], item = make("li", "item"), head = make("p", "item-head");
    const id = make("bdi", "", items.id[n]);
    head.append(make("b", "", given.names[code]), " ", id);
    const gold = make("p", "gold", "Gold: ");
    gold.append(foreign(make("b"), code, words(items.gold[n])));
    const groups = new Map();
    for (const [name, a] of Object.entries(items.answers)) {
      if (a.answer[n] < 0) continue;
      const key = [a.value[n], a.answer[n], a.prompt[n]].join();
      const group = groups.get(key) || { right: right(a, n), value: a.value[n], answer: words(a.answer[n]), prompt: words(a.prompt[n]), names: [], reasons: [] };
      group.names.push(title(name));
      group.reasons.push(words(a.reason[n]));
      groups.set(key, group);
    }
    const list = make("ul", "answers");
    for (const group of [...groups.values()].sort((a, b) => b.value - a.value || b.names.length - a.names.length)) {
      const line = make("li", group.right ? "is-right" : "is-wrong");
      const said = make("p", "said");
      said.append(make("span", "judged", judged(group)), " ", foreign(make("span", "answer"), code, group.answer || "(nothing)"));
      const who = make("p", "who");
      const alike = group.reasons.every((reason) => reason === group.reasons[0]);
      group.names.forEach((name, k) => {
        const chip = make("span", "chip");
        chip.append(make("bdi", "", name));
        if (!alike && group.reasons[k]) chip.append(" · ", make("bdi", "why", group.reasons[k]));
        who.append(chip, " ");
      });
      line.append(said, who);
      if (alike && group.reasons[0]) line.append(foreign(make("p", "reason"), code, group.reasons[0]));
      if (group.prompt) { const other = make("details", "long"); other.append(make("summary", "", "Asked in other words"), foreign(make("p", "prompt"), code, group.prompt)); line.append(other); }
      list.append(line);
    }
    item.append(head, prompt(code, words(items.prompt[n])), gold, list);
    return item;
  };
  const draw = () => {
    at("items").replaceChildren(...found.slice(first, first + PAGE).map(card));
    at("items").start = first + 1;
    const last = Math.min(first + PAGE, found.length);
    at("ex-status").textContent = found.length ? `Items ${first + 1}–${last} of ${found.length}` : "No item is like that";
    at("ex-back").disabled = first === 0;
    at("ex-next").disabled = last >= found.length;
  };
  const refresh = () => {
    if (!given) return;
    for (const control of document.querySelectorAll(".pair")) control.hidden = at("ex-mode").value !== "pair";
    found = wanted();
    first = 0;
    draw();
  };
  const turn = (by) => { first += by; draw(); at("examples").scrollIntoView(); };
  on(at("filters"), "input", refresh);
  on(at("filters"), "submit", (event) => event.preventDefault());
  on(at("ex-back"), "click", () => turn(-PAGE));
  on(at("ex-next"), "click", () => turn(PAGE));
  const cell = (value) => {
    let text = String(value);
    if (/^\s*[=+\-@]/.test(text) && typeof value === "string") text = `'${text}`;
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  on(at("examples-csv"), "click", () => {
    if (!given) return;
    const lines = [["language", "id", "gold", "method", "answer", "reason", "value", "prompt"].join()];
    for (const [code, n] of found) {
      const items = given.items[code];
      for (const [name, a] of Object.entries(items.answers)) {
        if (a.answer[n] < 0) continue;
        const asked = words(a.prompt[n]) || words(items.prompt[n]);
        lines.push([code, items.id[n], words(items.gold[n]), name, words(a.answer[n]), words(a.reason[n]), a.value[n], asked].map(cell).join());
      }
    }
    save("examples.csv", `${lines.join("\n")}\n`, "text/csv");
  });
  const begin = async () => {
    try {
      given = await unpack(island("examples-data").gzip);
      refresh();
    } catch (error) {
      at("ex-status").textContent = error.message;
    }
  };
  const idle = window.requestIdleCallback || ((does) => setTimeout(does, 50));
  idle(begin, { timeout: 1500 });
})();
