"use strict";
// Before anything is drawn: the colours asked for, and what folds is folded while it is parsed.
(() => {
  const root = document.documentElement;
  const asked = new URLSearchParams(location.search).get("theme");
  root.dataset.theme = asked === "dark" || asked === "light" ? asked
    : matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  const fold = () => { for (const box of document.querySelectorAll("details[data-fold][open]")) { box.open = false; } };
  const watch = new MutationObserver(fold);
  watch.observe(root, { childList: true, subtree: true });
  document.addEventListener("DOMContentLoaded", () => { watch.disconnect(); fold(); });
})();
