"use strict";
(() => {
  const root = document.documentElement;
  root.classList.add("js");

  // A figure names colours as CSS variables, so that one figure serves both themes.
  const resolved = (value) => {
    if (typeof value === "string") {
      const match = /^var\((--[a-z]+)\)$/.exec(value);
      return match ? getComputedStyle(root).getPropertyValue(match[1]).trim() : value;
    }
    if (Array.isArray(value)) return value.map(resolved);
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, resolved(inner)]));
    }
    return value;
  };

  const figures = JSON.parse(document.getElementById("figures").textContent);
  // The buttons are named one by one: among Plotly's own there is one that sends the data to its maker.
  const options = {
    responsive: true,
    displaylogo: false,
    plotlyServerURL: "",
    showSendToCloud: false,
    showLink: false,
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]],
  };
  const draw = () => {
    for (const [name, figure] of Object.entries(figures)) {
      const place = document.getElementById("figure-" + name);
      if (place) Plotly.react(place, resolved(figure.data), resolved(figure.layout), options);
    }
  };
  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  addEventListener("beforeprint", draw);
  addEventListener("afterprint", draw);

  const table = document.getElementById("trials");
  if (!table) return; // a page without a table to sort
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const search = document.getElementById("trials-search");
  const outcome = document.getElementById("trials-outcome");
  const shown = document.getElementById("trials-shown");
  const filter = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let visible = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      const fits = words.every((word) => text.includes(word)) && (!outcome.value || row.dataset.outcome === outcome.value);
      row.hidden = !fits;
      visible += fits ? 1 : 0;
    }
    shown.textContent = visible + " of " + rows.length;
  };
  search.addEventListener("input", filter);
  outcome.addEventListener("change", filter);
  filter();

  const key = (row, column) => {
    const cell = row.cells[column];
    if (!("value" in cell.dataset)) return cell.textContent.trim().toLowerCase();
    return cell.dataset.value === "" ? null : Number(cell.dataset.value);
  };
  const headers = [...table.tHead.rows[0].cells];
  const sort = (header) => {
    const column = headers.indexOf(header);
    const down = header.getAttribute("aria-sort") === "ascending";
    for (const other of headers) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", down ? "descending" : "ascending");
    // What was not measured stays at the end either way.
    rows.sort((a, b) => {
      const [x, y] = [key(a, column), key(b, column)];
      if (x === null || y === null) return (x === null) - (y === null);
      return (x < y ? -1 : x > y ? 1 : 0) * (down ? -1 : 1);
    });
    body.append(...rows);
  };
  for (const header of headers) {
    header.tabIndex = 0;
    header.addEventListener("click", () => sort(header));
    header.addEventListener("keydown", (event) => {
      if (event.key === "Enter") sort(header);
    });
  }
})();
