"use strict";

/* Dark or light colours: those of the system, until the switch is used. Not a module, which would run after the first
 * drawing and let the other colours flash. */
{
  const KEY = "llama-pte.theme", root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const current = () => localStorage.getItem(KEY) ?? (system.matches ? "dark" : "light");

  const apply = () => {
    root.dataset.theme = current();
    const button = document.getElementById("theme");
    if (!button) return;
    const other = current() === "dark" ? "Light" : "Dark";
    button.textContent = other;
    button.ariaLabel = `${other} colours`;
  };

  apply();
  system.addEventListener("change", apply);
  addEventListener("storage", apply);
  document.addEventListener("DOMContentLoaded", () => {
    apply();
    document.getElementById("theme").addEventListener("click", () => {
      localStorage.setItem(KEY, current() === "dark" ? "light" : "dark");
      apply();
    });
  });
}
