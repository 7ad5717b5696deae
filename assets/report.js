"use strict";
// The page of report.py: sliders between two versions of a picture, and the channels of a layer.

const all = (selector, within = document) => [...within.querySelectorAll(selector)];

// A slider's range input lies invisibly on the picture: arrow keys and fingers move it by
// themselves; what is left to do is to move the edge between the two versions.
for (const frame of all(".frame")) {
  const range = frame.querySelector("input");
  const follow = () => frame.style.setProperty("--x", range.value + "%");
  range.addEventListener("input", follow);
  follow();                                      // a reloaded page may remember the position
}

// The two menus choose the versions on both sides of all sliders.
const menus = {left: document.querySelector("#left"), right: document.querySelector("#right")};

function choose(side) {
  for (const frame of all(".frame")) {
    for (const layer of all(".layer", frame)) {
      const chosen = layer.dataset.version === menus[side].value;
      layer.classList.toggle(side, chosen);
      if (chosen) frame.querySelector(".tag." + side).textContent = layer.dataset.says;
    }
  }
}

for (const side of ["left", "right"]) {
  menus[side].addEventListener("change", () => choose(side));
  choose(side);
}

const near = document.querySelector("#near");
const approach = () => document.body.classList.toggle("near", near.checked);
near.addEventListener("change", approach);
approach();

// A bar of a chart of widths shows in which order its channels were selected.
function showOrder(bar) {
  const order = JSON.parse(bar.dataset.order);
  const panel = document.getElementById(bar.dataset.panel);
  const cells = document.createElement("div");
  cells.className = "cells";
  for (let channel = 0; channel < Number(bar.dataset.dense); channel++) {
    const place = order.indexOf(channel);
    const cell = document.createElement("i");
    cell.title = `channel ${channel}: ` + (place < 0 ? "cut" : `selected as number ${place + 1}`);
    if (place >= 0) {
      cell.className = "kept";
      cell.textContent = place + 1;
      cell.style.background = `rgb(9 105 218 / ${100 - 35 * place / order.length}%)`;
    }
    cells.append(cell);
  }
  panel.replaceChildren(bar.dataset.says, cells);
}

for (const chart of all(".broad")) {
  const bars = all(".bar", chart);
  for (const bar of bars) {
    bar.addEventListener("mouseenter", () => showOrder(bar));
    bar.addEventListener("click", () => showOrder(bar));
  }
  showOrder(bars[0]);
}
