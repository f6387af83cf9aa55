"use strict";

// A click on the head of a column sorts its table: numbers the largest first, then the other way.
function sortBy(head) {
  const table = head.closest("table");
  const column = head.cellIndex;
  const rows = [...table.tBodies[0].rows];
  const isNumber = rows.some((row) => "value" in row.cells[column].dataset);
  const down = head.ariaSort === "none" ? isNumber : head.ariaSort === "ascending";
  const compare = (one, other) => {
    const [a, b] = [one, other].map((row) => row.cells[column]);
    if (isNumber) return Number(a.dataset.value) - Number(b.dataset.value);
    return a.textContent.localeCompare(b.textContent, undefined, { numeric: true });
  };
  rows.sort((one, other) => (down ? compare(other, one) : compare(one, other)));
  table.tBodies[0].append(...rows);
  for (const other of head.parentElement.cells) other.ariaSort = "none";
  head.ariaSort = down ? "descending" : "ascending";
}
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => sortBy(button.parentElement));
}

// What is typed into a field hides the rows of its table that do not contain it.
for (const field of document.querySelectorAll("input[data-table]")) {
  const table = document.getElementById(field.dataset.table);
  const count = field.parentElement.querySelector("output");
  field.addEventListener("input", () => {
    const text = field.value.trim().toLowerCase();
    let shown = 0;
    for (const row of table.tBodies[0].rows) {
      row.hidden = !row.textContent.toLowerCase().includes(text);
      shown += !row.hidden;
    }
    count.value = text ? `${shown} of ${table.tBodies[0].rows.length}` : "";
  });
}

// A click on a picture opens it in its own size, the next click or Esc closes it.
const large = document.getElementById("large");
for (const button of document.querySelectorAll(".picture")) {
  button.addEventListener("click", () => {
    const picture = button.querySelector("img");
    const image = large.querySelector("img");
    image.src = picture.src;
    image.alt = picture.alt;
    large.showModal();
  });
}
large.addEventListener("click", () => large.close());

// The precision-recall curves of the chosen class.
const choice = document.getElementById("pr-class");
if (choice) {
  const curves = JSON.parse(document.getElementById("pr-curves").textContent);
  const axes = document.getElementById("pr-axes").dataset;
  const paths = document.querySelectorAll("#pr-lines path");
  const x = (recall) => Number(axes.left) + recall * axes.side;
  const y = (precision) => Number(axes.top) + (1 - precision) * axes.side;
  const draw = () => {
    const curve = curves[choice.value];
    curve.lines.forEach((line, k) => {
      const points = line.map((value, i) => `${x(i / (line.length - 1))} ${y(value)}`);
      paths[k].setAttribute("d", points.length ? `M${points.join("L")}` : "");
    });
    const best = document.getElementById("pr-best");
    best.setAttribute("visibility", curve.best ? "visible" : "hidden");
    if (curve.best) {
      best.setAttribute("cx", x(curve.best.recall));
      best.setAttribute("cy", y(curve.best.precision));
    }
    document.getElementById("pr-text").textContent = curve.text;
    for (const row of document.querySelectorAll("tr.choosable")) {
      row.classList.toggle("chosen", row.dataset.curve === choice.value);
    }
  };
  choice.addEventListener("change", draw);
  for (const row of document.querySelectorAll("tr.choosable")) {
    row.addEventListener("click", () => {
      choice.value = row.dataset.curve;
      draw();
    });
  }
  draw();
}
