"use strict";
/* Data of the page, small helpers, and the one choice that all sections share: the kind of edit. */

const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);
const kindListeners = [];
let kind = "";

/** A number of the data: null stands for none, text for infinity. */
function number(value) {
  if (value === null || value === undefined) return NaN;
  return typeof value === "string" ? (value === "inf" ? Infinity : -Infinity) : value;
}

/** A number as the page shows it. */
function figure(value, digits) {
  if (Number.isNaN(value)) return "n/a";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  return value.toFixed(digits).replace("-", "−");
}

/** A number with its sign, unless it is shown as zero. */
function signed(value, digits) {
  const text = figure(value, digits);
  if (!/[1-9∞]/.test(text)) return text.replace("−", "");
  return value > 0 ? `+${text}` : text;
}

/** An element with attributes and children; text children are never read as markup. */
function make(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** The same within an SVG. */
function draw(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

/** Options of a menu, from [value, text] pairs. */
function offer(select, pairs, chosen) {
  select.replaceChildren(...pairs.map(([value, text]) => make("option", { value }, text)));
  select.value = String(chosen);
}

const columnPairs = () => data.columns.map((column) => [column.key, column.title]);
const columnAt = (key) => data.columns.findIndex((column) => column.key === key);

/** +1 where higher is better, -1 where lower is, 0 where neither. */
const sense = (column) => ({ higher: 1, lower: -1 })[column.better] || 0;

function chooseKind(key) {
  kind = key;
  for (const listener of kindListeners) listener();
}
