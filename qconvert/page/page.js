"use strict";
// Sorting, searching and opening rows; without it the page is complete, in the order of the report.
const value = (cell) => {
  if (cell.dataset.v !== undefined) return Number(cell.dataset.v);
  const text = cell.textContent, found = Number(text.replaceAll(",", ""));
  return text === "–" ? -Infinity : Number.isNaN(found) ? text : found;
};
const compare = (a, b) => typeof a === "number" && typeof b === "number"
  ? (a < b ? -1 : a > b ? 1 : 0) : String(a).localeCompare(String(b), "en", { numeric: true });
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  const input = document.querySelector(`input[data-for=${table.id}]`);
  const told = document.querySelector(`output[data-count=${table.id}]`);
  const all = document.querySelector(`button[data-all=${table.id}]`);
  const texts = new Map();
  const show = () => {
    const words = (input?.value ?? "").toLowerCase().split(/\s+/).filter(Boolean);
    let found = 0, shown = 0;
    for (const row of body.rows) {
      if (words.length && !texts.has(row)) texts.set(row, row.textContent.toLowerCase());
      const good = words.every((word) => texts.get(row).includes(word));
      const room = !all || all.hidden || shown < Number(all.dataset.first);
      row.hidden = !(good && room);
      found += good ? 1 : 0;
      shown += row.hidden ? 0 : 1;
    }
    if (told) told.textContent = `${found} of ${body.rows.length} rows`
      + (shown < found ? `, the first ${shown} shown` : "");
  };
  heads.forEach((head, i) => head.querySelector("button")?.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const rows = [...body.rows].map((row) => [value(row.cells[i]), row]);
    rows.sort((a, b) => up ? compare(a[0], b[0]) : compare(b[0], a[0]));
    body.append(...rows.map(([, row]) => row));
    show();
  }));
  body.addEventListener("click", (event) => {
    if (!String(getSelection())) event.target.closest("tr").classList.toggle("open");
  });
  input?.addEventListener("input", show);
  all?.addEventListener("click", () => { all.hidden = true; show(); });
  show();
}
