// Legends of charts: a click hides a series, hovering or focusing highlights it. Everything is
// found by `data-series` and `data-toggle` keys. The legend of a figure rules that figure, the
// legend of the page rules all of them.
"use strict";
(() => {
  const scopeOf = toggle => toggle.closest("figure") ?? document;
  const inScope = (scope, attribute, key) =>
    [...scope.querySelectorAll(`[${attribute}="${CSS.escape(key)}"]`)];

  const setLit = (toggle, lit) => {
    const scope = scopeOf(toggle), key = toggle.dataset.toggle;
    for (const group of inScope(scope, "data-series", key)) {
      group.classList.toggle("lit", lit);
      group.closest("svg").classList.toggle("lit", lit);
    }
    for (const other of inScope(scope, "data-toggle", key)) other.classList.toggle("lit", lit);
  };

  const flip = toggle => {
    const scope = scopeOf(toggle), key = toggle.dataset.toggle;
    const shown = toggle.getAttribute("aria-pressed") === "false";
    for (const group of inScope(scope, "data-series", key)) group.classList.toggle("off", !shown);
    for (const other of inScope(scope, "data-toggle", key))
      other.setAttribute("aria-pressed", String(shown));
    // A chart must not stay dimmed in favor of a series that is no longer there.
    setLit(toggle, shown);
  };

  for (const toggle of document.querySelectorAll("[data-toggle]")) {
    const name = toggle.dataset.label ?? toggle.textContent.trim();
    toggle.setAttribute("role", "button");
    toggle.setAttribute("tabindex", "0");
    toggle.setAttribute("aria-pressed", "true");
    toggle.setAttribute("aria-label", `Show ${name}`);
    // An image has no parts that could be focused; a group has.
    toggle.closest("svg")?.setAttribute("role", "group");
    toggle.addEventListener("click", () => flip(toggle));
    toggle.addEventListener("keydown", event => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      flip(toggle);
    });
    const light = () => setLit(toggle, toggle.getAttribute("aria-pressed") === "true");
    toggle.addEventListener("pointerenter", light);
    toggle.addEventListener("focus", light);
    toggle.addEventListener("pointerleave", () => setLit(toggle, false));
    toggle.addEventListener("blur", () => setLit(toggle, false));
  }

  for (const group of document.querySelectorAll("[data-series]")) {
    const key = group.dataset.series;
    const [toggle] = [group.closest("figure"), document]
      .flatMap(scope => scope ? inScope(scope, "data-toggle", key) : [])
      // Other figures may use the same key for legends of their own.
      .filter(other => scopeOf(other) === document || scopeOf(other).contains(group));
    if (!toggle) continue;
    group.addEventListener("pointerenter", () => setLit(toggle, true));
    group.addEventListener("pointerleave", () => setLit(toggle, false));
  }
})();
