// Shows the numbers of the mark under the pointer, or of the cell reached with the arrow keys, in the line under its chart.
for (const figure of document.querySelectorAll("figure")) {
  const line = figure.querySelector(".readout");
  const svg = figure.querySelector(".chart svg");
  if (!line || !svg) continue;
  const show = (mark) => {
    const title = mark && mark.querySelector("title");
    if (!title) return;
    line.textContent = title.textContent;
    line.classList.add("live");
  };
  svg.addEventListener("pointerover", (event) => show(event.target.closest(".heat rect, .bar, .mark")));
  if (!svg.classList.contains("heat")) continue;
  const cells = [...svg.querySelectorAll("rect")];
  const rows = Number(svg.dataset.rows);
  let here = 0;
  const move = (to) => {
    if (to < 0 || to >= cells.length) return;
    cells[here].classList.remove("here");
    here = to;
    cells[here].classList.add("here");
    show(cells[here]);
  };
  const steps = { ArrowUp: -1, ArrowDown: 1, ArrowLeft: -rows, ArrowRight: rows };
  svg.addEventListener("focus", () => { if (svg.matches(":focus-visible")) move(here); });
  svg.addEventListener("blur", () => cells[here].classList.remove("here"));
  svg.addEventListener("keydown", (event) => {
    const step = steps[event.key];
    if (step === undefined) return;
    event.preventDefault();
    move(here + step);
  });
}
