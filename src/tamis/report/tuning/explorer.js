// One head's frontier: choose a layer and a head, move along, read what the place would cost.
(() => {
  const box = document.getElementById("explorer");
  if (!box) return;
  const facts = JSON.parse(document.getElementById("survey").textContent);
  const [layers, heads, stop, said] = ["layer", "head", "stop", "said"].map((id) => document.getElementById(id));
  const [low, high, maskLimit, limit] = facts.scale; // of a mask alone, and with all that adds to it
  const draw = (name, d) => box.querySelector(`svg ${name}`).setAttribute("d", d);
  const down = (error) => {
    const exponent = error > 0 ? Math.log10(error) : low;
    return (high - Math.min(Math.max(exponent, low), high)) / (high - low);
  };
  const place = (density, error) => `${density} ${down(error).toFixed(4)}`;
  const curve = (points, which) => "M" + points.map((point) => place(point[0], point[which])).join("L");
  const number = (value) => (value === 0 ? "0" : value < 1e-4 ? value.toExponential(1) : String(Number(value.toPrecision(3))));
  const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)}%`;
  const fill = (select, names) => select.replaceChildren(...names.map((name, index) => new Option(name, index)));
  const tell = (rows) => said.replaceChildren(...rows.flatMap(([name, text]) => {
    const [term, value] = [document.createElement("dt"), document.createElement("dd")];
    [term.textContent, value.textContent] = [name, text];
    return [term, value];
  }));
  const head = () => facts.layers[layers.value].heads[heads.value];

  const errors = (mean, worst, limit) => {
    const beyond = limit !== null && worst > limit ? ", beyond the budget" : limit !== null ? ", within the budget" : "";
    return `mean ${number(mean)}, largest ${number(worst)}${beyond}`;
  };
  const cost = (density) => (density >= 1 ? "as much as dense attention"
    : density > 0 ? `${percent(density)} of dense attention, which computes ${number(1 / density)}\u00d7 as much` : "nothing");

  const show = () => {
    const { chosen, settings, points } = head();
    const [density, mean, worst, candidate] = points[stop.value];
    draw(".at", `M${place(density, worst)}h0`);
    const rows = [
      ["stop", `${Number(stop.value) + 1} of ${points.length}`],
      ["settings", facts.grid[candidate]],
      ["density", `${density.toFixed(3)}: ${cost(density)}`],
      ["error", errors(mean, worst, maskLimit)],
    ];
    if (chosen) {
      const now = facts.density / facts.heads;
      const then = now + (density - chosen[0]) / facts.heads;
      rows.push(["whole model", `mean density ${now.toFixed(4)} with what was chosen, ${then.toFixed(4)} with this`]);
      rows.push(["chosen", `${settings}: density ${chosen[0].toFixed(3)}, ${errors(chosen[1], chosen[2], limit)} (measured)`]);
    }
    tell(rows);
    stop.setAttribute("aria-valuetext", rows.slice(1, 4).map((row) => row.join(" ")).join(", "));
  };
  const chooseHead = () => {
    const { chosen, points } = head();
    draw(".curve:not(.mean)", curve(points, 2));
    draw(".curve.mean", curve(points, 1));
    draw(".chosen", chosen ? `M${place(chosen[0], chosen[2])}h0` : "");
    const far = (point) => (chosen ? Math.abs(point[0] - chosen[0]) : 0);
    stop.max = points.length - 1;
    stop.value = points.reduce((best, point, index) => (far(point) < far(points[best]) ? index : best), 0);
    show();
  };
  const chooseLayer = () => {
    fill(heads, facts.layers[layers.value].heads.map((_, index) => String(index)));
    chooseHead();
  };
  if (!facts.layers.some((layer) => layer.heads.length)) return;
  fill(layers, facts.layers.map((layer) => layer.name));
  layers.addEventListener("change", chooseLayer);
  heads.addEventListener("change", chooseHead);
  stop.addEventListener("input", show);
  box.hidden = false;
  chooseLayer();
})();
