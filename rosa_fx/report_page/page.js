"use strict";
(() => {
  const table = document.getElementById("weights");
  const pairs = table ? [...table.querySelectorAll("tr.weight")].map((row) => [row, row.nextElementSibling]) : [];

  function open(row, wanted) {
    const detail = row.nextElementSibling;
    const show = wanted === undefined ? detail.hidden : wanted;
    detail.hidden = !show;
    row.classList.toggle("open", show);
    const large = detail.querySelector("img.large");
    if (show && large && !large.src) large.src = row.querySelector(".thumb img").src;
  }
  for (const [row] of pairs) row.addEventListener("click", () => open(row));
  function follow() {
    const row = location.hash && document.getElementById(location.hash.slice(1));
    if (row && row.classList.contains("weight")) {
      row.hidden = false;
      open(row, true);
      row.scrollIntoView({ block: "start" });
    }
  }
  addEventListener("hashchange", follow);
  if (pairs.length === 1) open(pairs[0][0], true);
  follow();

  const heads = table ? [...table.querySelectorAll("thead th")] : [];
  heads.forEach((head, column) => {
    if (!head.dataset.sort) return;
    head.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "descending" || (head.dataset.sort === "s" && head.getAttribute("aria-sort") !== "ascending");
      for (const other of heads) if (other.dataset.sort) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", down ? "ascending" : "descending");
      const key = (pair) => pair[0].children[column].dataset.v;
      const order = head.dataset.sort === "n"
        ? (a, b) => Number(key(a)) - Number(key(b))
        : (a, b) => key(a).localeCompare(key(b), undefined, { numeric: true });
      const sorted = [...pairs].sort((a, b) => (down ? order(a, b) : order(b, a)));
      table.tBodies[0].append(...sorted.flat());
    });
  });

  const filter = document.getElementById("filter");
  if (filter) filter.addEventListener("input", () => {
    const text = filter.value.trim().toLowerCase();
    for (const [row, detail] of pairs) {
      row.hidden = !row.children[1].dataset.v.toLowerCase().includes(text);
      detail.hidden = row.hidden || !row.classList.contains("open");
    }
  });

  const tip = document.getElementById("tip");
  function say(text, event) {
    tip.textContent = text;
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    tip.style.left = Math.max(4, Math.min(event.clientX + 14, innerWidth - box.width - 8)) + "px";
    tip.style.top = Math.max(4, event.clientY - box.height - 12) + "px";
  }
  function quiet() { tip.hidden = true; }

  const metric = document.getElementById("metric");
  const cells = [...document.querySelectorAll(".grid a")];
  if (metric) metric.addEventListener("change", () => {
    for (const cell of cells) cell.style.setProperty("--p", cell.dataset.p.split("|")[metric.selectedIndex]);
  });
  for (const cell of cells) {
    cell.addEventListener("mousemove", (event) => {
      const lines = cell.dataset.t.split("|").map((value, i) => metric.options[i].text + ": " + value);
      say([cell.getAttribute("aria-label"), ...lines].join("\n"), event);
    });
    cell.addEventListener("mouseleave", quiet);
  }

  const steps = JSON.parse(document.getElementById("steps").textContent);
  for (const chart of document.querySelectorAll(".chart")) {
    chart.addEventListener("mousemove", (event) => {
      const box = chart.getBoundingClientRect();
      const at = ((event.clientX - box.left) / box.width * chart.viewBox.baseVal.width - chart.dataset.left) / chart.dataset.wide;
      const step = Number(chart.dataset.first) + at * (Number(chart.dataset.last) - chart.dataset.first + 1) - 0.5;
      if (at < 0 || at > 1 || !steps.rows.length) return quiet();
      const near = steps.rows.reduce((a, b) => (Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a));
      say(steps.names.map((name, i) => name.replaceAll("_", " ") + ": " + (near[i] === null ? "–" : near[i])).join("\n"), event);
    });
    chart.addEventListener("mouseleave", quiet);
  }
})();
