// Small parts of the pages of `graft report` and `graft serve`. Nothing is ever made from markup: elements come from
// createElement, words go in as text, so that a name or a review can do nothing.
"use strict";

const live = document.getElementById("live");

function node(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function shape(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children); // a string becomes text
  return element;
}

function say(words) {
  live.textContent = words;
}

function percent(value) {
  return `${(100 * value).toFixed(1)}%`;
}
