"use strict";
// Everything can be read without this script; it adds sorting, the choice of colours, and open lists on paper.
const theme = document.getElementById("theme");
const isDark = () => {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
};
const showTheme = () => {
  theme.textContent = isDark() ? "Light" : "Dark";
  theme.setAttribute("aria-label", isDark() ? "Use light colours" : "Use dark colours");
};
theme.removeAttribute("aria-pressed");
theme.addEventListener("click", () => {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  showTheme();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showTheme);
showTheme();
theme.hidden = false;

const sortBy = (table, head, column) => {
  const descending = head.getAttribute("aria-sort") === "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", descending ? "descending" : "ascending");
  const body = table.tBodies[0];
  const rows = [...body.rows].map((row) => {
    const cell = row.cells[column];
    const value = cell.dataset.value;
    return { row, text: cell.textContent.trim(), number: value === undefined ? NaN : Number(value) };
  });
  const compare = (a, b) => {
    if (!a.text || !b.text) return Number(!a.text) - Number(!b.text);  // empty cells stay last
    const numbers = !Number.isNaN(a.number) && !Number.isNaN(b.number);
    const order = numbers ? a.number - b.number : a.text.localeCompare(b.text, "en", { numeric: true });
    return descending ? -order : order;
  };
  body.append(...rows.sort(compare).map((entry) => entry.row));
};
for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    if (head.classList.contains("bars") || !head.textContent.trim()) return;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sortBy(table, head, column));
    head.append(button);
  });
}

const folded = [...document.querySelectorAll("details")];
addEventListener("beforeprint", () => { for (const details of folded) { details.dataset.was = details.open ? "1" : ""; details.open = true; } });
addEventListener("afterprint", () => { for (const details of folded) details.open = Boolean(details.dataset.was); });
