"use strict";
(() => {
  // Texts reach the page through textContent only, never as HTML.
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const lower = data.texts.map((text) => text.toLowerCase());
  const state = { query: "", arm: -1, prompt: -1, column: -1, descending: false, page: 0, size: 25 };

  const matches = (row) =>
    (state.arm < 0 || row[0] === state.arm) && (state.prompt < 0 || row[1] === state.prompt) &&
    (!state.query || [row[1], row[2], row[3]].some((i) => i >= 0 && lower[i].includes(state.query)));

  const value = (row, column) =>
    column === 0 ? row[0] : column === 4 ? (row[4] === null ? -Infinity : row[4]) : row[column] < 0 ? "" : lower[row[column]];

  function selected() {
    const rows = data.rows.filter(matches);
    if (state.column >= 0) {
      const way = state.descending ? -1 : 1;
      rows.sort((a, b) => {
        const x = value(a, state.column), y = value(b, state.column);
        return x < y ? -way : x > y ? way : 0;
      });
    }
    return rows;
  }

  function make(tag, text, kind) {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    if (kind) element.className = kind;
    return element;
  }

  function textCell(name, index, missing) {
    const cell = make("td"), block = make("div", index < 0 ? missing : data.texts[index] || "(empty)", "text");
    cell.dataset.label = name;
    if (index < 0 || !data.texts[index]) block.classList.add("none");
    block.dir = "auto";
    cell.append(block);
    return cell;
  }

  function line(row) {
    const tr = make("tr"), arm = make("td", undefined, "small"), dot = make("span", undefined, "dot");
    dot.style.background = data.arms[row[0]][1];
    arm.append(dot, data.arms[row[0]][0]);
    const prompt = textCell("Prompt x", row[1], "");
    const same = make("button", "This prompt in every arm", "link");
    same.addEventListener("click", (event) => {
      event.stopPropagation();
      Object.assign(state, { query: "", arm: -1, prompt: row[1], page: 0 });
      at("query").value = ""; at("arm").value = "-1";
      draw();
    });
    prompt.append(same);
    const reward = make("td", row[4] === null ? "–" : row[4].toFixed(3).replace("-", "−"), "n");
    reward.dataset.label = "Reward";
    tr.append(arm, prompt, textCell("Rewrite x′", row[2], "x itself"), textCell("Response y", row[3], ""), reward);
    tr.addEventListener("click", () => { if (!String(getSelection())) tr.classList.toggle("open"); });
    return tr;
  }

  function draw() {
    const rows = selected(), pages = Math.max(1, Math.ceil(rows.length / state.size));
    state.page = Math.min(state.page, pages - 1);
    at("body").replaceChildren(...rows.slice(state.page * state.size, (state.page + 1) * state.size).map(line));
    if (!rows.length) {
      const cell = make("td", "No row matches.", "none");
      cell.colSpan = 5;
      const tr = make("tr"); tr.append(cell); at("body").append(tr);
    }
    const known = rows.filter((row) => row[4] !== null);
    const mean = known.reduce((sum, row) => sum + row[4], 0) / known.length;
    at("count").textContent = `${rows.length} of ${data.rows.length} rows` + (known.length ? `, mean reward ${mean.toFixed(3).replace("-", "−")}` : "");
    at("page").textContent = `page ${state.page + 1} of ${pages}`;
    at("previous").disabled = state.page === 0;
    at("next").disabled = state.page === pages - 1;
    for (const button of document.querySelectorAll("#samples th button")) {
      const own = Number(button.dataset.column) === state.column;
      button.textContent = button.textContent.replace(/ [▲▼]$/, "") + (own ? (state.descending ? " ▼" : " ▲") : "");
      button.parentElement.setAttribute("aria-sort", own ? (state.descending ? "descending" : "ascending") : "none");
    }
  }

  const arms = at("arm");
  arms.append(new Option("All arms", "-1"), ...data.arms.map(([label], i) => new Option(label, String(i))));
  at("query").addEventListener("input", (event) => { state.query = event.target.value.toLowerCase(); state.page = 0; draw(); });
  arms.addEventListener("change", () => { state.arm = Number(arms.value); state.page = 0; draw(); });
  at("size").addEventListener("change", (event) => { state.size = Number(event.target.value); state.page = 0; draw(); });
  at("previous").addEventListener("click", () => { state.page -= 1; draw(); });
  at("next").addEventListener("click", () => { state.page += 1; draw(); });
  at("reset").addEventListener("click", () => {
    Object.assign(state, { query: "", arm: -1, prompt: -1, column: -1, descending: false, page: 0 });
    at("query").value = ""; arms.value = "-1";
    draw();
  });
  for (const button of document.querySelectorAll("#samples th button")) {
    button.addEventListener("click", () => {
      const column = Number(button.dataset.column);
      state.descending = state.column === column ? !state.descending : column === 4;
      state.column = column; state.page = 0;
      draw();
    });
  }
  draw();
})();
