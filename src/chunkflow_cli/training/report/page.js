// Show the values under the pointer. Without it, the page is the same, and only this is missing.
for (const chart of document.querySelectorAll(".chart")) {
  const data = JSON.parse(chart.querySelector("script").textContent);
  const plot = chart.querySelector(".plot");
  const at = plot.appendChild(Object.assign(document.createElement("div"), { className: "at", hidden: true }));
  const tip = plot.appendChild(Object.assign(document.createElement("div"), { className: "tip", hidden: true }));
  const place = (step) => (data.last > data.first ? (step - data.first) / (data.last - data.first) : 0.5);
  const nearest = (steps, wanted) =>
    steps.reduce((best, step, i) => (Math.abs(step - wanted) < Math.abs(steps[best] - wanted) ? i : best), 0);
  const show = (event) => {
    const box = plot.getBoundingClientRect();
    const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    const wanted = data.first + share * (data.last - data.first);
    const steps = data.series.map((each) => each.steps[nearest(each.steps, wanted)]);
    const step = steps[nearest(steps, wanted)];
    const lines = data.series
      .map((each) => [each.name, each.values[each.steps.indexOf(step)]])
      .filter(([, value]) => value !== undefined)
      .map(([name, value]) => `${name} ${value}`);
    tip.replaceChildren(...[`step ${step.toLocaleString("en")}`, ...lines].map((text) =>
      Object.assign(document.createElement("div"), { textContent: text })));
    at.hidden = tip.hidden = false;
    at.style.left = `${100 * place(step)}%`;
    const left = place(step) * box.width;
    tip.style.left = `${Math.max(0, left + 8 + tip.offsetWidth < box.width ? left + 8 : left - 8 - tip.offsetWidth)}px`;
  };
  plot.addEventListener("pointermove", show);
  plot.addEventListener("pointerdown", show);
  plot.addEventListener("pointerleave", () => { at.hidden = tip.hidden = true; });
}
