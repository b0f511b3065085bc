"use strict";
const root = document.documentElement;
const themeButton = document.getElementById("theme");
const darkByNature = window.matchMedia("(prefers-color-scheme: dark)");

function isDark() {
  return root.dataset.theme ? root.dataset.theme === "dark" : darkByNature.matches;
}
function showTheme() {
  themeButton.textContent = isDark() ? "Light" : "Dark";
  themeButton.setAttribute("aria-pressed", String(isDark()));
}
themeButton.addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  showTheme();
});
darkByNature.addEventListener("change", showTheme);
showTheme();

for (const radio of document.querySelectorAll(".switch input")) {
  radio.addEventListener("change", () => { radio.closest(".network").dataset.colour = radio.value; });
}

const tiles = [...document.querySelectorAll(".tile")];
const tip = document.getElementById("tip");

function choose(tile) {
  for (const other of tiles) {
    other.setAttribute("aria-pressed", String(other === tile));
    other.tabIndex = other === tile ? 0 : -1;
    document.getElementById(other.dataset.sheet).hidden = other !== tile;
  }
}
function move(tile, key) {
  const at = tiles.indexOf(tile);
  const to = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: tiles.length - 1 }[key];
  if (to === undefined || !tiles[to]) return false;
  tile.tabIndex = -1;
  tiles[to].tabIndex = 0;
  tiles[to].focus();
  return true;
}
function showTip(tile) {
  tip.textContent = tile.getAttribute("aria-label");
  tip.hidden = false;
  const box = tile.getBoundingClientRect();
  const left = Math.min(Math.max(8, box.left + box.width / 2 - tip.offsetWidth / 2), root.clientWidth - tip.offsetWidth - 8);
  const above = box.top - tip.offsetHeight - 8;
  tip.style.left = `${left + window.scrollX}px`;
  tip.style.top = `${(above > 0 ? above : box.bottom + 8) + window.scrollY}px`;
}
function hideTip() { tip.hidden = true; }

for (const tile of tiles) {
  tile.addEventListener("click", () => choose(tile));
  tile.addEventListener("keydown", (event) => { if (move(tile, event.key)) event.preventDefault(); });
  tile.addEventListener("mouseenter", () => showTip(tile));
  tile.addEventListener("mouseleave", hideTip);
  tile.addEventListener("focus", () => { if (tile.matches(":focus-visible")) showTip(tile); });
  tile.addEventListener("blur", hideTip);
}
window.addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });
window.addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
});
