"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (selector, inside = document) => inside.querySelector(selector);
const all = (selector, inside = document) => [...inside.querySelectorAll(selector)];
function make(tag, text, properties = {}) {  // text never becomes markup
  const element = Object.assign(document.createElement(tag), properties);
  if (text !== undefined) element.textContent = text;
  return element;
}

// Tables: a click on a heading sorts by it, a second click turns the order round.
for (const button of all("th button")) button.addEventListener("click", () => {
  const th = button.parentElement, table = th.closest("table"), body = table.tBodies[0];
  const number = th.dataset.kind === "number";
  const order = th.ariaSort === (number ? "descending" : "ascending") ? (number ? "ascending" : "descending")
                                                                      : (number ? "descending" : "ascending");
  for (const other of th.parentElement.cells) other.removeAttribute("aria-sort");
  th.setAttribute("aria-sort", order);
  const key = row => row.cells[th.cellIndex].dataset.value ?? row.cells[th.cellIndex].textContent;
  const rows = [...body.rows].sort((a, b) => number ? key(a) - key(b) : key(a).localeCompare(key(b)));
  body.append(...(order === "descending" ? rows.reverse() : rows));
});

// The search: a slider, and a button that lets it run.
const slider = $("#epoch");
if (slider) {
  const show = () => {
    const at = Number(slider.value), epoch = data.epochs[at];
    $("#epoch-now").textContent = slider.ariaValueText = `epoch ${epoch}`;
    for (const place of all("[data-search]")) {
      const kind = data.searches[place.dataset.search][place.dataset.kind], index = kind.epochs.indexOf(epoch);
      if (index < 0) continue;  // this run was shorter
      $(".stage", place).innerHTML = data.cells[kind.cells[index]];  // drawn by ensemble/svg.py from checked names
      const chosen = new Set(kind.chosen[index]);
      all(".heat td", place).forEach((td, i) => {
        const value = kind.alphas[index][i] / 1000;
        td.textContent = value.toFixed(2);
        td.style.setProperty("--v", value);
        td.classList.toggle("chosen", chosen.has(i));
      });
    }
  };
  let timer;
  const play = $("#play"), stop = () => { clearInterval(timer); timer = undefined; play.textContent = "Play"; };
  slider.addEventListener("input", () => { stop(); show(); });
  play.addEventListener("click", () => {
    if (timer) return stop();
    if (slider.value === slider.max) slider.value = 0;
    play.textContent = "Pause";
    show();
    timer = setInterval(() => {
      slider.value = Number(slider.value) + 1;
      show();
      if (slider.value === slider.max) stop();
    }, 600);
  });
  show();
}

// Thumbnails: each image is a place in one picture.
function thumbnail(element, index) {
  const {tile, columns, side, scale} = data.sprite, place = data.images[index].place;
  element.style.cssText = `width:${side * scale}px;height:${side * scale}px;background-image:var(--sprite);`
    + `background-size:${tile * columns * scale}px auto;`
    + `background-position:${-(place % columns) * tile * scale}px ${-Math.floor(place / columns) * tile * scale}px`;
}
if (data.sprite) {
  document.documentElement.style.setProperty("--sprite", `url(${data.sprite.uri})`);
  for (const element of all(".thumb")) thumbnail(element, element.dataset.image);
}

// The confusion matrix: arrow keys walk over its fields, a click shows the images of one.
const fields = all(".matrix button"), matrix = $(".matrix");
fields.forEach((button, i) => { button.tabIndex = i ? -1 : 0; });
matrix?.addEventListener("keydown", event => {
  const step = {ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0]}[event.key];
  if (!step || event.target.tagName !== "BUTTON") return;
  event.preventDefault();
  let row = event.target.closest("tr").rowIndex, column = event.target.closest("td").cellIndex, button;
  do {
    row += step[0]; column += step[1];
    button = matrix.rows[row]?.cells[column] && $("button", matrix.rows[row].cells[column]);
  } while (!button && matrix.rows[row]?.cells[column]);
  if (button) { event.target.tabIndex = -1; button.tabIndex = 0; button.focus(); }
});
matrix?.addEventListener("click", event => {
  const button = event.target.closest("button");
  if (!button) return;
  for (const other of fields) other.setAttribute("aria-pressed", other === button);
  for (const other of fields) other.tabIndex = other === button ? 0 : -1;
  const [truth, answer] = button.dataset.field.split(",").map(Number), count = Number(button.dataset.count);
  const indices = Object.keys(data.images).filter(i => data.images[i].field === `${truth},${answer}`)
    .sort((a, b) => data.images[b].probability - data.images[a].probability);
  const shown = indices.length && indices.length < count ? ` The ${indices.length} it was surest of:` : "";
  const list = make("ul", undefined, {className: "images"});
  for (const index of indices) {
    const item = make("li"), thumb = make("span", undefined, {className: "thumb"});
    thumb.setAttribute("role", "img");
    thumb.setAttribute("aria-label", data.images[index].name);
    thumbnail(thumb, index);
    item.append(thumb, make("div", `${data.images[index].name}: ${(100 * data.images[index].probability).toFixed(0)} % sure`),
                make("small", `votes: ${data.images[index].votes.map(v => data.classes[v]).join(", ")}`));
    list.append(item);
  }
  $("#field").replaceChildren(
    make("h3", `${count} image${count > 1 ? "s" : ""} of ${data.classes[truth]} ${truth === answer ? "recognised" : `taken for ${data.classes[answer]}`}`),
    make("p", indices.length ? shown : "No thumbnails of these are kept in this file."), list);
});
