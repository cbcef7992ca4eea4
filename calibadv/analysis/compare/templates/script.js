"use strict";
for (const button of document.querySelectorAll("[data-arm]")) {
  button.addEventListener("click", () => {
    const hidden = document.body.classList.toggle(`hide-arm-${button.dataset.arm}`);
    button.setAttribute("aria-pressed", String(!hidden));
  });
}
for (const box of document.querySelectorAll("[data-hides]")) {
  const apply = () => document.body.classList.toggle(`no-${box.dataset.hides}`, !box.checked);
  box.addEventListener("change", apply);
  apply(); // browsers keep boxes over a reload
}
