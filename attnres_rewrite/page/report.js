"use strict";
// Tables with class "data" sort by a click on a column's name; those with data-search get a box that filters rows.
(() => {
  const order = new Intl.Collator("en", { numeric: true });

  const keyOf = (row, column) => {
    const cell = row.cells[column];
    return (cell.dataset.value ?? cell.textContent).trim();
  };
  const isNumber = (key) => key !== "" && Number.isFinite(Number(key));
  // what is no number stands last, in both directions
  const compareNumbers = (one, other, sign) => {
    if (isNumber(one) !== isNumber(other)) return isNumber(one) ? -1 : 1;
    return isNumber(one) ? sign * (Number(one) - Number(other)) : 0;
  };

  const sort = (table, header, column) => {
    const descending = header.getAttribute("aria-sort") === "ascending";
    const sign = descending ? -1 : 1;
    const body = table.tBodies[0];
    const rows = [...body.rows].map((row) => ({ row, key: keyOf(row, column) }));
    const compare = header.classList.contains("num")
      ? (a, b) => compareNumbers(a.key, b.key, sign)
      : (a, b) => sign * order.compare(a.key, b.key);
    for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
    header.setAttribute("aria-sort", descending ? "descending" : "ascending");
    body.append(...rows.sort(compare).map((entry) => entry.row));
  };

  const makeSortable = (table) => {
    [...table.tHead.rows[0].cells].forEach((header, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...header.childNodes);
      header.append(button);
      header.setAttribute("aria-sort", "none");
      button.addEventListener("click", () => sort(table, header, column));
    });
  };

  const makeSearchable = (table) => {
    const what = table.dataset.search;
    const rows = [...table.tBodies[0].rows].map((row) => ({ row, text: row.textContent.toLowerCase() }));
    const tools = document.createElement("div");
    const label = document.createElement("label");
    const input = document.createElement("input");
    const shown = document.createElement("output");
    tools.className = "tools";
    input.type = "search";
    input.placeholder = "words, all of which a row has";
    label.append(`Search ${what}`, input);
    tools.append(label, shown);
    table.parentElement.before(tools);
    const filter = () => {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      let count = 0;
      for (const { row, text } of rows) {
        row.hidden = !words.every((word) => text.includes(word));
        count += row.hidden ? 0 : 1;
      }
      shown.textContent = `${count.toLocaleString("en")} of ${rows.length.toLocaleString("en")} shown`;
    };
    input.addEventListener("input", filter);
    filter();
  };

  for (const table of document.querySelectorAll("table.data")) {
    makeSortable(table);
    if (table.dataset.search) makeSearchable(table);
  }
})();
