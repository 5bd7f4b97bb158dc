"use strict";
// Draws the chart of the page from the JSON beside it, and filters the page by target and precision. Plain SVG, so that
// points can be reached by keyboard, printed sharply and follow light and dark; no library, since those that draw such
// charts weigh a megabyte and give their points no focus.
(() => {
  const data = JSON.parse(document.getElementById("chart-data").textContent);
  const figure = document.getElementById("chart");
  const SPACE = "http://www.w3.org/2000/svg";
  const LOG_FROM = 10; // largest to smallest value above which an axis is logarithmic
  const CHARACTER = 7; // width of a label's character, on the safe side
  const state = { x: null, y: null, set: null, targets: new Set(), precisions: new Set() };

  const make = (name, attributes = {}, text = "") => {
    const element = document.createElementNS(SPACE, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text) element.textContent = text;
    return element;
  };
  const html = (name, attributes = {}, ...children) => {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  };
  const axisOf = (id) => data.axes.find((axis) => axis.id === id);
  const plain = (value) => String(Number(value.toPrecision(10)));

  // -- axes -----------------------------------------------------------------------------------------------------------

  function linear(low, high, most, floor, ceiling) {
    const margin = Math.max((high - low) * 0.12 || Math.abs(high) * 0.1, 1e-6);
    low = Math.max(low - margin, floor);
    high = Math.min(high + margin, ceiling);
    if (high <= low) { low -= margin; high += margin; }
    const rough = (high - low) / most;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= rough * (1 - 1e-9));
    const ticks = [];
    for (let index = Math.ceil(low / step - 1e-9); index * step <= high * (1 + 1e-9); index += 1) ticks.push(index * step);
    return { ticks, log: false, place: (value) => (value - low) / (high - low) };
  }

  function logarithmic(low, high, most) {
    low /= 1.15;
    high *= 1.15;
    let ticks = [];
    for (const steps of [[1, 2, 5], [1, 3], [1]]) {
      ticks = [];
      for (let decade = Math.floor(Math.log10(low)); decade <= Math.ceil(Math.log10(high)); decade += 1)
        for (const step of steps) {
          const value = Number(`${step}e${decade}`);
          if (value >= low && value <= high) ticks.push(value);
        }
      if (ticks.length <= most) break;
    }
    return { ticks, log: true, place: (value) => Math.log(Math.max(value, low) / low) / Math.log(high / low) };
  }

  function scale(axis, points, most, extra = []) {
    const values = points.map((point) => point.values[axis.id][0]);
    const ends = points.flatMap((point) => point.values[axis.id]).filter((value) => value !== null).concat(extra);
    if (axis.better === "low" && Math.min(...ends) > 0 && Math.max(...values) / Math.min(...values) > LOG_FROM)
      return logarithmic(Math.min(...ends), Math.max(...ends), most);
    return linear(Math.min(...ends), Math.max(...ends), most, axis.better === "low" ? 0 : -Infinity,
      axis.better === "high" ? 100 : Infinity);
  }

  // What no other point beats, best in x first.
  function front(points, x, y) {
    const good = (axis, point) => (axis.better === "low" ? -1 : 1) * point.values[axis.id][0];
    const ordered = [...points].sort((a, b) => good(x, b) - good(x, a) || good(y, b) - good(y, a));
    const kept = [];
    for (const point of ordered) if (!kept.length || good(y, point) > good(y, kept[kept.length - 1])) kept.push(point);
    return kept;
  }

  // -- drawing --------------------------------------------------------------------------------------------------------

  function mark(look, x, y) {
    if (look === "fail") return make("path", { class: "mark fail", d: `M${x - 6},${y - 6}l12,12m0,-12l-12,12` });
    if (look === "inconclusive") return make("path", { class: "mark inconclusive", d: `M${x},${y - 7}l7,7l-7,7l-7,-7z` });
    if (look === "error") return make("rect", { class: "mark error", x: x - 5, y: y - 5, width: 10, height: 10 });
    return make("circle", { class: `mark ${look}`, cx: x, cy: y, r: look === "other" ? 5 : 6 });
  }

  function describe(point) {
    return [point.title, ...point.lines].join("\n");
  }

  const tip = html("div", { class: "tip", role: "tooltip", id: "chart-tip" });
  tip.hidden = true;

  function show(point, x, y) {
    tip.replaceChildren(html("strong", {}, point.title), ...point.lines.map((line) => html("span", {}, line)));
    tip.hidden = false;
    const room = figure.clientWidth - tip.offsetWidth - 4;
    tip.style.left = `${Math.max(4, Math.min(x + 14, room))}px`;
    tip.style.top = `${Math.max(0, y - tip.offsetHeight - 14)}px`;
  }
  const hide = () => { tip.hidden = true; };

  function draw() {
    const x = axisOf(state.x), y = axisOf(state.y);
    const wanted = data.points.filter((point) => point.set === state.set
      && state.targets.has(point.target) && state.precisions.has(point.precision));
    const points = wanted.filter((point) => x.id in point.values && y.id in point.values);
    const missing = wanted.filter((point) => !points.includes(point));
    const width = Math.max(280, Math.round(figure.clientWidth));
    const height = Math.round(Math.min(420, Math.max(300, width * 0.5)));
    const left = 52, right = width - 16, top = 26, base = height - 44;
    const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, class: "plot", role: "group",
      "aria-label": `${y.title} over ${x.title}` });
    hide();
    if (points.length) {
      const lines = y.id === "metric" && state.set === "shipped" ? data.lines.filter((line) => {
        const values = points.map((point) => point.values[y.id][0]);
        const room = Math.max(2 * (Math.max(...values) - Math.min(...values)), 3);
        return line.value >= Math.min(...values) - room && line.value <= Math.max(...values) + room;
      }) : [];
      const across = scale(x, points, Math.max(3, Math.floor(width / 90)));
      const up = scale(y, points, 6, lines.map((line) => line.value));
      const clamp = (share) => Math.min(Math.max(share, 0), 1);
      const atX = (value) => left + clamp(across.place(value)) * (right - left);
      const atY = (value) => base - clamp(up.place(value)) * (base - top);
      for (const tick of up.ticks) {
        svg.append(make("line", { class: "grid", x1: left, x2: right, y1: atY(tick), y2: atY(tick) }));
        svg.append(make("text", { class: "tick", x: left - 8, y: atY(tick) + 4, "text-anchor": "end" }, plain(tick)));
      }
      for (const tick of across.ticks) {
        svg.append(make("line", { class: "grid", x1: atX(tick), x2: atX(tick), y1: top, y2: base }));
        svg.append(make("text", { class: "tick", x: atX(tick), y: base + 18, "text-anchor": "middle" }, plain(tick)));
      }
      svg.append(make("line", { class: "axis", x1: left, x2: right, y1: base, y2: base }));
      svg.append(make("line", { class: "axis", x1: left, x2: left, y1: top, y2: base }));
      svg.append(make("text", { class: "title", x: right, y: height - 6, "text-anchor": "end" },
        x.title + (across.log ? ", log" : "")));
      svg.append(make("text", { class: "title", x: 4, y: 14 }, y.title + (up.log ? ", log" : "")));
      const taken = [[0, 0, 90, 16]];
      for (const line of lines) {
        const place = atY(line.value);
        svg.append(make("line", { class: "reference", x1: left, x2: right, y1: place, y2: place }));
        svg.append(make("text", { class: "tick", x: right - 4, y: place - 5, "text-anchor": "end" },
          `${line.title} ${plain(Number(line.value.toFixed(2)))}`));
        taken.push([right - 95, place - 18, right, place - 2]);
      }
      const best = front(points, x, y);
      let path = `M${atX(best[0].values[x.id][0])},${atY(best[0].values[y.id][0])}`;
      for (const point of best.slice(1)) path += `H${atX(point.values[x.id][0])}V${atY(point.values[y.id][0])}`;
      svg.append(make("path", { class: "front", d: `${path}H${x.better === "low" ? right : left}` }));
      for (const point of points) {
        const [px, py] = [atX(point.values[x.id][0]), atY(point.values[y.id][0])];
        taken.push([px - 8, py - 8, px + 8, py + 8]);
      }
      const labels = [];
      for (const point of points) {
        const [vx, lowX, highX] = point.values[x.id], [vy, lowY, highY] = point.values[y.id];
        const px = atX(vx), py = atY(vy);
        const group = make("g", { class: "point", tabindex: "0", role: "img", "aria-label": describe(point) });
        if (lowY !== null && highY !== null)
          group.append(make("line", { class: "whisker", x1: px, x2: px, y1: atY(lowY), y2: atY(highY) }));
        if (lowX !== null && highX !== null)
          group.append(make("line", { class: "whisker", x1: atX(lowX), x2: atX(highX), y1: py, y2: py }));
        group.append(make("circle", { class: "hover", cx: px, cy: py, r: 15 }), mark(point.look, px, py));
        for (const event of ["pointerenter", "focus", "click"])
          group.addEventListener(event, () => show(point, px, py + svg.getBoundingClientRect().top
            - figure.getBoundingClientRect().top));
        for (const event of ["pointerleave", "blur"]) group.addEventListener(event, hide);
        svg.append(group);
        labels.push(...label(point, px, py, taken, left, right, top, base));
      }
      svg.append(...labels);
    } else {
      svg.append(make("text", { class: "tick", x: width / 2, y: height / 2, "text-anchor": "middle" },
        wanted.length ? "nothing has both of these" : "everything is filtered out"));
    }
    figure.replaceChildren(svg, tip);
    const names = missing.map((point) => point.label);
    const shown = names.slice(0, 8).join(", ") + (names.length > 8 ? ` and ${names.length - 8} more` : "");
    const what = [x, y].map((axis) => axis.title).join(" and ");
    document.getElementById("chart-missing").textContent = names.length ? `Without ${what}, so not drawn: ${shown}.` : "";
  }

  // The first place beside a point that is free; a label that has none is left out, the tip still names the point.
  function label(point, x, y, taken, left, right, top, base) {
    const name = point.label.length <= 28 ? point.label : `${point.label.slice(0, 16)}…${point.label.slice(-11)}`;
    const length = name.length * CHARACTER;
    const places = [[x + 12, y - 6], [x - 12 - length, y - 6], [x + 12, y + 16], [x - 12 - length, y + 16]];
    for (let i = 0; i < 3; i += 1) places.push([x - length / 2, y - 14 - 14 * i], [x - length / 2, y + 24 + 14 * i]);
    for (const [start, line] of places) {
      const box = [start, line - 11, start + length, line + 3];
      const inside = box[0] >= left && box[2] <= right && box[1] >= top - 12 && box[3] <= base;
      if (inside && !taken.some((other) => box[0] < other[2] && other[0] < box[2] && box[1] < other[3] && other[1] < box[3])) {
        taken.push(box);
        return [make("text", { class: "label", x: start, y: line }, name)];
      }
    }
    return [];
  }

  // -- what can be chosen ---------------------------------------------------------------------------------------------

  function choice(title, entries, value, change) {
    const select = html("select", {}, ...entries.map(([id, text]) => html("option", { value: id }, text)));
    select.value = value;
    select.addEventListener("change", () => { change(select.value); draw(); });
    return html("label", {}, `${title} `, select);
  }

  function filter(title, names, kept) {
    names.forEach((name) => kept.add(name));
    if (names.length < 2) return [];
    const boxes = names.map((name) => {
      const box = html("input", { type: "checkbox", value: name, checked: "" });
      box.addEventListener("change", () => { box.checked ? kept.add(name) : kept.delete(name); apply(); });
      return html("label", {}, box, ` ${name}`);
    });
    return [html("fieldset", {}, html("legend", {}, title), ...boxes)];
  }

  // Tables and cards follow the filters, too; a row that belongs to several targets stays while one of them is wanted.
  function apply() {
    for (const element of document.querySelectorAll("[data-target]"))
      element.hidden = !state.targets.has(element.dataset.target)
        || ("precision" in element.dataset && !state.precisions.has(element.dataset.precision));
    if (figure) draw();
  }

  const names = (key) => [...new Set([...document.querySelectorAll(`[data-${key}]`)]
    .map((element) => element.dataset[key]))];
  const filters = document.getElementById("filters");
  filters.append(...filter("Targets", names("target"), state.targets),
    ...filter("Precisions", names("precision"), state.precisions));
  filters.hidden = !filters.childElementCount;

  if (figure) {
    const sets = [["shipped", "what is shipped, test split"], ["tried", "all that was tried, validation split"]]
      .filter(([id]) => data.points.filter((point) => point.set === id).length > 1);
    const axes = data.axes.map((axis) => [axis.id, axis.title]);
    state.set = sets[0][0];
    state.x = axes[0][0];
    state.y = axes.some(([id]) => id === "metric") && state.x !== "metric" ? "metric" : axes[1][0];
    const controls = document.getElementById("chart-controls");
    controls.append(choice("Across", axes, state.x, (value) => { state.x = value; }),
      choice("Up", axes, state.y, (value) => { state.y = value; }));
    if (sets.length > 1) controls.append(choice("Show", sets, state.set, (value) => { state.set = value; }));
    document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
    let drawn = figure.clientWidth;
    new ResizeObserver(() => {
      if (figure.clientWidth !== drawn) { drawn = figure.clientWidth; draw(); }
    }).observe(figure);
    draw();
  }

  // On paper everything is open.
  const folded = [];
  addEventListener("beforeprint", () => {
    for (const details of document.querySelectorAll("details:not([open])")) { details.open = true; folded.push(details); }
  });
  addEventListener("afterprint", () => { for (const details of folded.splice(0)) details.open = false; });
})();
