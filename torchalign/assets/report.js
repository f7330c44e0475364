"use strict";
// Without this script the page is complete: two pictures beside each other, and the whole table.
(() => {
  const table = document.querySelector("#frames");
  const body = table.tBodies[0];
  const rows = Array.from(body.rows);
  const headers = Array.from(table.tHead.rows[0].cells);
  const tools = document.querySelector(".tools");
  const text = document.querySelector("#find");
  const status = document.querySelector("#status");
  const count = document.querySelector("#count");

  // data-value holds the number behind a cell, and is empty where there is none
  const valueOf = (row, column) => row.cells[column].dataset.value ?? row.cells[column].textContent;

  function compare(a, b, column, numeric) {
    const [one, other] = [valueOf(a, column), valueOf(b, column)];
    if (one === "" || other === "") return (one === "") - (other === ""); // always last
    const sign = headers[column].getAttribute("aria-sort") === "descending" ? -1 : 1;
    return sign * (numeric ? one - other : one.localeCompare(other));
  }

  headers.forEach((header, column) => {
    const button = header.querySelector("button");
    if (!button) return;
    button.disabled = false;
    button.addEventListener("click", () => {
      const up = header.getAttribute("aria-sort") !== "ascending";
      headers.forEach((other) => other.removeAttribute("aria-sort"));
      header.setAttribute("aria-sort", up ? "ascending" : "descending");
      const numeric = header.dataset.type === "number";
      rows.sort((a, b) => compare(a, b, column, numeric));
      body.append(...rows);
    });
  });

  function filter() {
    const words = text.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const of = row.dataset.status;
      const right = status.value === "" || (status.value === "flagged" ? of !== "OK" : of === status.value);
      const content = row.textContent.toLowerCase();
      row.hidden = !(right && words.every((word) => content.includes(word)));
      shown += !row.hidden;
    }
    count.textContent = `${shown} of ${rows.length} frames shown`;
  }

  text.addEventListener("input", filter);
  status.addEventListener("change", filter);
  document.querySelector("#reset").addEventListener("click", () => {
    text.value = status.value = "";
    filter();
  });
  tools.hidden = false;
  filter();

  const pair = document.querySelector(".compare");
  if (pair) {
    const slide = document.querySelector(".slide");
    const move = () => pair.style.setProperty("--cut", `${slide.value}%`);
    slide.addEventListener("input", move);
    // the picture itself can be dragged, too
    const drag = (event) => {
      if (event.buttons === 0 && event.type === "pointermove") return;
      const box = pair.getBoundingClientRect();
      slide.value = (100 * (event.clientX - box.left)) / box.width;
      move();
    };
    // one picture, then the other: the eye sees what moves
    const flicker = document.querySelector(".flicker");
    let timer = 0;
    flicker.addEventListener("click", () => {
      const on = timer === 0;
      flicker.setAttribute("aria-pressed", String(on));
      if (!on) {
        clearInterval(timer);
        timer = 0;
        return;
      }
      timer = setInterval(() => {
        slide.value = slide.value < 50 ? 100 : 0;
        move();
      }, 500);
    });
    pair.addEventListener("pointerdown", drag);
    pair.addEventListener("pointermove", drag);
    pair.classList.add("on");
    slide.hidden = flicker.hidden = false;
    move();
  }
})();
