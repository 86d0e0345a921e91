// Helpers of the pages of `graft report` and `graft serve`. No HTML is ever parsed: elements come from createElement and
// strings become text nodes, so markup in a name or a review has no effect.
"use strict";

const live = document.getElementById("live");

function node(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function svgNode(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children); // a string becomes text
  return element;
}

// For screen readers.
function announce(text) {
  live.textContent = text;
}

function percent(value) {
  return `${(100 * value).toFixed(1)}%`;
}
