"use strict";
// Before anything is drawn: the colours asked for, and what folds is folded while it is parsed.
(() => {
  const root = document.documentElement;
  const asked = new URLSearchParams(location.search).get("theme");
  root.dataset.theme = asked === "dark" || asked === "light" ? asked
    : matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  const watch = new MutationObserver((records) => {
    for (const { addedNodes } of records) {
      for (const node of addedNodes) { if (node.nodeName === "DETAILS" && "fold" in node.dataset) { node.open = false; } }
    }
  });
  watch.observe(root, { childList: true, subtree: true });
  document.addEventListener("DOMContentLoaded", () => watch.disconnect());
})();
