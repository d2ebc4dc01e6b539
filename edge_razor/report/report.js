"use strict";
(() => {
  const tip = document.getElementById("tip");

  function format(value, unit) {
    if (value === null || value === undefined) return "–";
    if (unit === "share") return (value * 100).toFixed(value < 0.1 ? 2 : 1) + " %";
    if (unit !== "bytes") return String(Number(value.toPrecision(4)));
    for (const [size, name] of [[1e9, "GB"], [1e6, "MB"], [1e3, "kB"]])
      if (Math.abs(value) >= size) {
        const n = value / size;
        return n.toFixed(n >= 100 ? 0 : n >= 10 ? 1 : 2) + " " + name;
      }
    return value + " B";
  }

  function row(name, value, color) {
    const line = document.createElement("span");
    if (color) line.append(Object.assign(document.createElement("i"), { className: "swatch " + color }));
    line.append(name);
    if (value) line.append(Object.assign(document.createElement("em"), { textContent: value }));
    return line;
  }

  function show(event, ...rows) {
    tip.replaceChildren(...rows);
    tip.hidden = false;
    const { width, height } = tip.getBoundingClientRect();
    const left = event.clientX + 16 + width > innerWidth ? event.clientX - width - 16 : event.clientX + 16;
    const top = event.clientY + 16 + height > innerHeight ? event.clientY - height - 16 : event.clientY + 16;
    tip.style.left = Math.max(4, Math.min(left, innerWidth - width - 4)) + "px";
    tip.style.top = Math.max(4, top) + "px";
  }

  function bold(text) {
    return Object.assign(document.createElement("b"), { textContent: text });
  }

  for (const figure of document.querySelectorAll("figure.chart")) {
    const canvas = figure.querySelector(".canvas"), cursor = figure.querySelector(".cursor");
    const island = figure.querySelector('script[type="application/json"]');
    const chart = island ? JSON.parse(island.textContent) : null;
    const stacked = figure.dataset.kind === "stack";
    const first = chart ? chart.x[0] : 0;
    const last = chart ? chart.x[chart.x.length - 1] + (stacked ? 1 : 0) : 0;

    function hover(event) {
      const box = event.target.closest("[data-tip]");
      if (box) {
        const [name, ...rest] = box.dataset.tip.split("\n");
        show(event, bold(name), ...rest.map((text) => row(text)));
        return;
      }
      if (!chart || !chart.x.length) return leave();
      const frame = canvas.getBoundingClientRect();
      const at = first + ((event.clientX - frame.left) / frame.width) * (last - first);
      let index = 0;
      if (stacked) index = Math.max(0, chart.x.findLastIndex((x) => x <= at));
      else chart.x.forEach((x, i) => { if (Math.abs(x - at) < Math.abs(chart.x[index] - at)) index = i; });
      const title = chart.labels ? chart.labels[index] : chart.name + " " + format(chart.x[index]);
      const rows = chart.series.map((s) => row(s.name, format(s.values[index], chart.unit), s.color));
      if (stacked) {
        rows.reverse();
        const sum = chart.series.reduce((total, s) => total + (s.values[index] || 0), 0);
        rows.push(row("together", format(sum, chart.unit)));
      }
      cursor.style.display = "block";
      cursor.style.left = ((chart.x[index] + (stacked ? 0.5 : 0) - first) / (last - first || 1)) * 100 + "%";
      show(event, bold(title), ...rows);
    }
    function leave() {
      tip.hidden = true;
      cursor.style.display = "none";
    }
    canvas.addEventListener("pointermove", hover);
    canvas.addEventListener("pointerdown", hover);
    canvas.addEventListener("pointerleave", leave);
  }

  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
    heads.forEach((head, column) => head.querySelector("button")?.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") !== "descending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (line) => {
        const cell = line.cells[column], value = cell.dataset.value;
        return value === undefined ? cell.textContent : value === "" ? -Infinity : Number(value);
      };
      const rows = [...body.rows].sort((a, b) => {
        const x = key(a), y = key(b);
        return typeof x === "string" ? String(x).localeCompare(y, undefined, { numeric: true }) : x - y;
      });
      body.append(...(down ? rows.reverse() : rows));
    }));
  }
})();
