// The two explorers of the book. They compute nothing: the numbers stand in the page as JSON (made by
// support/explorers.py when the book is built), and are looked up and drawn here.
(function () {
  "use strict";

  // Helpers: elements, numbers, scales.

  function svg(parent, name, attributes, text) {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const key in attributes) node.setAttribute(key, attributes[key]);
    if (text !== undefined) node.textContent = text;
    parent.appendChild(node);
    return node;
  }

  function clear(node, width, height) {
    node.replaceChildren();
    node.setAttribute("viewBox", `0 0 ${width} ${height}`);
    node.setAttribute("height", height);
  }

  function superscript(integer) {
    return String(integer).replace(/./g, (c) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(c)]);
  }

  // Four digits; a power of ten where there would be many zeros.
  function format(value) {
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size >= 1e-3 && size < 1e5) return value.toPrecision(4).replace("-", "−");
    const [digits, exponent] = value.toExponential(3).split("e");
    return `${digits.replace("-", "−")} × 10${superscript(+exponent)}`;
  }

  // "3.1 ×": how many times a bound is the value.
  function times(bound, value) {
    if (value === 0) return bound === 0 ? "both 0" : "∞";
    return `${(bound / value).toPrecision(3)} ×`;
  }

  // A number for people, with all its digits in the attribute.
  function put(root, name, value) {
    const node = root.querySelector(`[data-value="${name}"]`);
    node.textContent = value === null ? "–" : format(value);
    node.value = value === null ? "" : String(value);
  }

  function linear(from, to, start, end) {
    return (x) => start + ((x - from) / (to - from)) * (end - start);
  }

  function logarithmic(from, to, start, end) {
    const scale = linear(Math.log10(from), Math.log10(to), start, end);
    return (x) => scale(Math.log10(x));
  }

  function nearest(values, wanted) {
    let best = 0;
    values.forEach((value, k) => {
      if (Math.abs(value - wanted) < Math.abs(values[best] - wanted)) best = k;
    });
    return best;
  }

  // The points of a line as a path; null and what lies below a log axis is a gap.
  function path(xs, ys) {
    let text = "", down = false;
    ys.forEach((y, k) => {
      const seen = y !== null && Number.isFinite(y);
      if (seen) text += `${down ? "L" : "M"}${xs[k].toFixed(1)} ${y.toFixed(1)}`;
      down = seen;
    });
    return text;
  }

  // Names beside the right ends of lines, pushed apart, each with a piece of its line.
  function label(group, lines, x, bottom) {
    lines.sort((a, b) => a.y - b.y);
    lines.forEach((line, k) => {
      line.place = Math.max(line.y, k ? lines[k - 1].place + 14 : 0);
    });
    for (let k = lines.length - 1, limit = bottom; k >= 0; k--, limit -= 14) {
      lines[k].place = Math.min(lines[k].place, limit);
    }
    for (const line of lines) {
      svg(group, "path", {
        class: `lead ${line.name}`, d: `M${x} ${line.y.toFixed(1)}L${x + 8} ${line.place.toFixed(1)}h8`,
      });
      svg(group, "text", { x: x + 20, y: line.place + 4 }, line.text);
    }
  }

  function decades(from, to) {
    const found = [];
    for (let e = Math.ceil(Math.log10(from) - 1e-9); e <= Math.log10(to) + 1e-9; e++) found.push(e);
    return found;
  }

  // Call `move(x, y)` in the picture's units while a pointer presses, or, of a mouse, hovers.
  function follow(picture, hovers, move) {
    function at(event) {
      const box = picture.getBoundingClientRect();
      const scale = picture.viewBox.baseVal.width / box.width;
      move((event.clientX - box.left) * scale, (event.clientY - box.top) * scale);
    }
    picture.addEventListener("pointerdown", (event) => {
      if (event.target.closest("[data-grab]") === null) return;
      picture.setPointerCapture(event.pointerId);
      at(event);
    });
    picture.addEventListener("pointermove", (event) => {
      const pressed = picture.hasPointerCapture(event.pointerId);
      if (pressed || (hovers && event.pointerType === "mouse")) at(event);
    });
  }

  function start(name, run) {
    const root = document.getElementById(`explorer-${name}`);
    const data = document.getElementById(`data-${name}`);
    if (!root || !data) return;
    root.hidden = false;
    document.body.classList.add("explorer-runs");
    const draw = run(root, JSON.parse(data.textContent));
    let width = root.clientWidth;
    new ResizeObserver(() => {
      if (root.clientWidth !== width) draw();
      width = root.clientWidth;
    }).observe(root);
    draw();
  }

  // The softmax.

  const NAMES = {
    "lambda-max-m": "exact",
    "lower-m": "certified, lower",
    "certified-m": "certified",
    "corollary-4-2": "Corollary 4.2",
    "proposition-4-3": "Proposition 4.3",
    "corollary-q-1": "Corollary Q.1",
    "theorem-5-2-m": "Theorem 5.2",
  };
  const PRESETS = { uniform: [10, 10], half: [15, 15], one: [28, 2], spread: [28, 1] };

  function softmax(root, data) {
    const find = (name) => root.querySelector(`#softmax-${name}`);
    const [classes, first, second, temperature] = ["classes", "first", "second", "temperature"].map(find);
    const [shade, where, bars] = ["shade", "where", "bars"].map(find);
    const steps = data.three.at[data.three.at.length - 1][0];
    const place = new Map(data.three.at.map(([i, j], k) => [`${i} ${j}`, k]));
    const three = () => classes.value === "3";
    const table = () => (three() ? data.three : data.ten);
    const index = () => (three() ? place.get(`${first.value} ${second.value}`) : +temperature.value);
    first.max = steps;
    temperature.max = data.ten.temperature.length - 1;

    function choose(i, j) {
      first.value = i;
      second.max = steps - i;
      second.value = j;
    }

    // Where we are: a point in the triangle, or a temperature.

    function corners(width) {
      const side = Math.min(width - 60, 330), left = (width - side) / 2, top = 26;
      const height = (side * Math.sqrt(3)) / 2;
      return [[left + side / 2, top], [left, top + height], [left + side, top + height]];
    }

    function point(sigma, at) {
      return [0, 1].map((d) => at.reduce((sum, corner, k) => sum + corner[d] * sigma[k], 0));
    }

    // How dark a dot is, from 0 to 1.
    function darkness(k) {
      const t = data.three, exact = t["lambda-max-m"][k];
      if (shade.value === "ratio") {
        const ratio = exact > 0 ? t["theorem-5-2-m"][k] / exact : 20;
        return t["theorem-5-2-m"][k] === 0 ? 0 : Math.min(Math.log(ratio) / Math.log(20), 1);
      }
      return t[shade.value][k] / Math.max(...t[shade.value]);
    }

    function drawTriangle(k) {
      const width = where.clientWidth, at = corners(width), bottom = at[1][1];
      clear(where, width, bottom + 30);
      const group = svg(where, "g", { class: `dots ${shade.value}`, "data-grab": "" });
      svg(group, "polygon", { class: "hull", points: at.map((corner) => corner.join()).join(" ") });
      const radius = ((at[2][0] - at[1][0]) / steps) * 0.44;
      data.three.sigma.forEach((sigma, n) => {
        const [x, y] = point(sigma, at);
        svg(group, "circle", {
          cx: x.toFixed(1), cy: y.toFixed(1), r: radius.toFixed(2),
          "fill-opacity": (0.06 + 0.94 * darkness(n)).toFixed(3),
        });
      });
      at.forEach(([x, y], n) => {
        svg(where, "text", { x, y: n ? y + 20 : y - 10, "text-anchor": "middle" }, `class ${n + 1}`);
      });
      const [x, y] = point(data.three.sigma[k], at);
      svg(where, "circle", { class: "here", cx: x, cy: y, r: 9 });
    }

    const CURVES = Object.keys(NAMES).reverse();

    function temperatureScale(width) {
      const t = data.ten.temperature;
      return logarithmic(t[0], t[t.length - 1], 42, width - 138);
    }

    function drawTemperatures(k) {
      const width = where.clientWidth, height = 320, bottom = height - 40;
      const x = temperatureScale(width), y = logarithmic(1e-3, 2, bottom, 10);
      clear(where, width, height);
      svg(where, "rect", {
        class: "plane", "data-grab": "", x: x(0.1), y: 10, width: x(100) - x(0.1), height: bottom - 10,
      });
      for (const e of decades(1e-3, 2)) {
        svg(where, "path", { class: "grid", d: `M${x(0.1)} ${y(10 ** e)}H${x(100)}` });
        svg(where, "text", { x: x(0.1) - 6, y: y(10 ** e) + 4, "text-anchor": "end" }, `10${superscript(e)}`);
      }
      for (const t of [0.1, 1, 10, 100]) {
        svg(where, "text", { x: x(t), y: bottom + 18, "text-anchor": "middle" }, String(t));
      }
      svg(where, "text", { x: x(Math.sqrt(10)), y: bottom + 36, "text-anchor": "middle" }, "temperature τ");
      const xs = data.ten.temperature.map(x), ends = [];
      for (const name of CURVES) {
        const ys = data.ten[name].map((value) => (value >= 1e-3 ? y(value) : null));
        svg(where, "path", { class: `line ${name}`, d: path(xs, ys) });
        ends.push({ name, text: NAMES[name], y: ys[ys.length - 1] });
      }
      label(where, ends, x(100) + 2, bottom);
      const here = xs[k];
      svg(where, "path", { class: "cursor", d: `M${here} 10V${bottom}` });
      for (const name of CURVES) {
        const value = data.ten[name][k];
        if (value >= 1e-3) svg(where, "circle", { class: `dot ${name}`, cx: here, cy: y(value), r: 3.5 });
      }
    }

    follow(where, false, (x, y) => {
      if (!three()) {
        const ends = data.ten.temperature.map(temperatureScale(where.clientWidth));
        temperature.value = nearest(ends, x);
      } else {
        const [a, b, c] = corners(where.clientWidth);
        const top = Math.max(0, Math.min(1, (b[1] - y) / (b[1] - a[1])));
        const i = Math.round(top * steps);
        const right = (x - b[0]) / (c[0] - b[0]) - i / steps / 2;
        const k = Math.max(0, Math.min(steps - i, Math.round(right * steps)));
        choose(i, steps - i - k);
      }
      draw();
    });

    // Probabilities and eigenvalues as bars.

    function drawBars(k) {
      const width = bars.clientWidth, rows = table();
      clear(bars, width, 300);
      for (const [name, title, top, most] of [
        ["sigma", "probabilities σ", 0, 1],
        ["eigenvalues", "eigenvalues of 𝓘", 155, 0.5],
      ]) {
        const values = rows[name][k], wide = (width - 44) / values.length, base = top + 130;
        const y = linear(0, most, base, top + 38);
        svg(bars, "text", { x: 36, y: top + 14, class: "title" }, title);
        for (const tick of [0, most / 2, most]) {
          svg(bars, "path", { class: "grid", d: `M36 ${y(tick)}H${width - 8}` });
          svg(bars, "text", { x: 30, y: y(tick) + 4, "text-anchor": "end" }, String(tick));
        }
        values.forEach((value, n) => {
          const left = 36 + wide * n;
          const bar = svg(bars, "rect", {
            class: `bar ${name}`, x: left + wide * 0.15, width: wide * 0.7,
            y: y(value), height: base - y(value),
          });
          svg(bar, "title", {}, format(value));
          if (values.length < 5) {
            const text = value ? value.toFixed(3) : "0";
            svg(bars, "text", { x: left + wide / 2, y: y(value) - 4, "text-anchor": "middle" }, text);
          }
        });
      }
    }

    // Values, bounds, and the sentence.

    function list(k) {
      const parent = root.querySelector('[data-value="eigenvalues"]');
      parent.replaceChildren();
      table().eigenvalues[k].forEach((value, n) => {
        if (n) parent.append(", ");
        const node = document.createElement("data");
        node.dataset.value = `eigenvalue-${n + 1}`;
        node.value = String(value);
        node.textContent = format(value);
        parent.append(node);
      });
    }

    function fill(k) {
      const rows = table();
      for (const row of root.querySelectorAll("tr[data-row]")) {
        const name = row.dataset.row, value = rows[name][k];
        const [of, largest] = row.dataset.of === "i" ? ["lambda-max-i", "spread"] : ["lambda-max-m", "theorem-5-2-m"];
        const exact = rows[of][k], most = Math.max(1, ...rows[largest]);
        put(root, name, value);
        row.querySelector(".ratio").textContent = name === of ? "" : times(value, exact);
        row.querySelector(".length").style.width = `${(100 * value) / most}%`;
        row.querySelector(".exact").style.left = `${(100 * exact) / most}%`;
        row.classList.toggle("is-tightest", rows.tightest[k].includes(name));
      }
    }

    function verdict(k) {
      const rows = table(), exact = rows["lambda-max-m"][k], bound = rows["theorem-5-2-m"][k];
      const best = rows.tightest[k], paper = rows["tightest-of-paper"][k];
      const spell = (names) => names.map((name) => NAMES[name]).join(", ").replace("certified", "the certified bound");
      const here = three()
        ? `Probabilities ${rows.sigma[k].map((p) => p.toFixed(3)).join(", ")}.`
        : `Temperature ${format(rows.temperature[k])}: each class ${format(rows.sigma[k][1] / rows.sigma[k][0])} times as probable as the one before.`;
      if (exact === 0 && bound === 0) return `${here} The label is certain: all eigenvalues and all bounds are 0.`;
      const term = rows["sigma-max"][k] <= rows.spread[k] ? "its first term, σmax" : "its second term, 1 − ‖σ‖²";
      const loose = exact === 0 ? "The value is 0, and every bound of the paper is positive." :
        `Theorem 5.2, by ${term}, is ${(bound / exact).toPrecision(3)} times the value.`;
      const second = best.includes(paper[0]) ? "" : ` Of the paper’s own bounds, ${spell(paper)} is the tightest.`;
      return `${here} Tightest upper bound of λmax(M): ${spell(best)}.${second} ${loose}`;
    }

    function draw() {
      const k = index();
      root.dataset.classes = classes.value;
      root.querySelector('[data-value="probability-1"]').textContent = (first.value / steps).toFixed(3);
      root.querySelector('[data-value="probability-2"]').textContent = (second.value / steps).toFixed(3);
      put(root, "temperature", data.ten.temperature[temperature.value]);
      first.setAttribute("aria-valuetext", (first.value / steps).toFixed(3));
      second.setAttribute("aria-valuetext", (second.value / steps).toFixed(3));
      temperature.setAttribute("aria-valuetext", format(data.ten.temperature[temperature.value]));
      (three() ? drawTriangle : drawTemperatures)(k);
      drawBars(k);
      list(k);
      fill(k);
      const sentence = root.querySelector('[data-value="verdict"]');
      const text = verdict(k);
      if (sentence.textContent !== text) sentence.textContent = text;
    }

    first.addEventListener("input", () => {
      choose(+first.value, Math.min(+second.value, steps - first.value));
      draw();
    });
    for (const control of [classes, second, temperature, shade]) control.addEventListener("input", draw);
    for (const button of root.querySelectorAll("[data-preset]")) {
      button.addEventListener("click", () => {
        choose(...PRESETS[button.dataset.preset]);
        draw();
      });
    }
    choose(steps / 2, 9);
    temperature.value = 20;
    return draw;
  }

  // Figure 1.

  const ABOVE = {
    fisher: "I", "fisher-bound": "bound", "sd-1": "√V₁", "sd-1-bound": "bound", "sd-1-certified": "certified",
    "sd-1-one-label": "N = 1", "sd-2": "√V₂", "sd-2-bound": "bound",
  };
  const BELOW = { "log-ratio-1": "UB/V₁", "log-ratio-2": "UB/V₂" };

  function figure1(root, data) {
    const find = (name) => root.querySelector(`#figure-1-${name}`);
    const [experiment, seed, layer, epoch] = ["activation", "seed", "layer", "epoch"].map(find);
    const picture = find("plot");

    function options(select, values, texts) {
      const wanted = select.value;
      select.replaceChildren(...values.map((value, k) => new Option(texts ? texts[k] : value, value)));
      if (values.map(String).includes(wanted)) select.value = wanted;
    }

    const runs = () => data.runs.filter((run) => run.experiment === experiment.value);
    const run = () => runs().find((one) => String(one.seed) === seed.value);
    const shown = () => run().layers.find((one) => String(one.layer) === layer.value);

    function choices() {
      options(experiment, [...new Set(data.runs.map((one) => one.experiment))]);
      options(seed, runs().map((one) => one.seed));
      const layers = run().layers;
      options(layer, layers.map((one) => one.layer), layers.map((one) => `${one.layer}${one.output ? " (output)" : ""}`));
      epoch.max = shown().epochs.length - 1;
    }

    // One scale for all layers of a run, so that they can be compared.
    function range() {
      const all = run().layers.flatMap((one) => Object.keys(ABOVE).flatMap((name) => one[name] || []));
      const positive = all.filter((value) => value > 0).map(Math.log10);
      const ratios = run().layers.flatMap((one) => Object.keys(BELOW).flatMap((name) => one[name] || []));
      return [10 ** Math.floor(Math.min(...positive)), 10 ** Math.ceil(Math.max(...positive)), Math.ceil(Math.max(...ratios))];
    }

    const xOf = (width) => linear(0, shown().epochs.length - 1, 46, width - 88);

    function drawPanel(names, top, bottom, y, values) {
      const width = picture.clientWidth, x = xOf(width), xs = values.epochs.map((_, k) => x(k)), ends = [];
      for (const name in names) {
        if (!values[name]) continue;
        const ys = values[name].map((value) => (value === null ? null : y(value)));
        svg(picture, "path", { class: `line ${name}`, d: path(xs, ys) });
        const last = ys[ys.length - 1];
        if (last !== null && Number.isFinite(last)) ends.push({ name, text: names[name], y: last });
        const here = ys[+epoch.value];
        if (here !== null && Number.isFinite(here)) {
          svg(picture, "circle", { class: `dot ${name}`, cx: xs[+epoch.value], cy: here, r: 3.5 });
        }
      }
      label(picture, ends, x(xs.length - 1) + 3, bottom);
    }

    function drawPlot() {
      const width = picture.clientWidth, values = shown(), [least, most, ratio] = range();
      const top = 24, middle = 320, lower = 366, bottom = 490;
      const x = xOf(width), right = x(values.epochs.length - 1);
      clear(picture, width, 530);
      svg(picture, "rect", { class: "plane", "data-grab": "", x: 36, y: 0, width: right - 20, height: 500 });
      const y = logarithmic(least, most, middle, top), z = linear(0, ratio, bottom, lower);
      svg(picture, "text", { class: "title", x: 46, y: 14 }, "mean over the layer’s parameters, nat/θ²");
      svg(picture, "text", { class: "title", x: 46, y: lower - 10 }, "log(UB / V)");
      const grid = (height, text) => {
        svg(picture, "path", { class: "grid", d: `M46 ${height}H${right}` });
        svg(picture, "text", { x: 40, y: height + 4, "text-anchor": "end" }, text);
      };
      decades(least, most).forEach((e) => grid(y(10 ** e), `10${superscript(e)}`));
      for (let tick = 0; tick <= ratio; tick += ratio > 6 ? 2 : 1) grid(z(tick), String(tick));
      values.epochs.forEach((value, k) => {
        if (value % 5 === 0) svg(picture, "text", { x: x(k), y: bottom + 18, "text-anchor": "middle" }, value);
      });
      svg(picture, "text", { x: (46 + right) / 2, y: bottom + 36, "text-anchor": "middle" }, "epoch");
      svg(picture, "path", { class: "cursor", d: `M${x(+epoch.value)} ${top}V${middle}M${x(+epoch.value)} ${lower}V${bottom}` });
      drawPanel(ABOVE, top, middle, y, values);
      drawPanel(BELOW, lower, bottom, z, values);
      if (!values["sd-2"]) {
        svg(picture, "text", { class: "note sd-2", x: right - 6, y: middle - 8, "text-anchor": "end" }, "V₂ = 0: not drawn");
      }
    }

    function fill() {
      const values = shown(), k = +epoch.value, of = run();
      for (const row of root.querySelectorAll("tr[data-row]")) {
        const name = row.dataset.row, there = values[name] !== undefined;
        row.hidden = !there && name === "sd-1-one-label";
        put(root, name, there ? values[name][k] : name === "sd-2" ? 0 : null);
      }
      put(root, "largest-probability", of["largest-probability"][k]);
      const about = root.querySelector('[data-value="run"]');
      about.replaceChildren(`${of.warning ? of.warning + ". " : ""}Run ${of.name}: test input ${of.input}, N = ${of.labels.toLocaleString("en")} labels, ${of.network}. `);
      const link = document.createElement("a");
      link.href = of.page;
      link.textContent = "Executed notebook";
      about.append(link, ".");
      const [fisher, one, two] = ["fisher", "sd-1", "sd-2"].map((name) => values[name] && values[name][k]);
      const second = two === undefined ? "V₂ is 0 in this layer: Î₂ is exact." : `√V₂ ${format(two)}; the ${one < two ? "first" : "second"} estimator varies less.`;
      const text = `Layer ${values.layer}${values.output ? " (output)" : ""}, epoch ${values.epochs[k]}: I ${format(fisher)}, √V₁ ${format(one)}, ${second}`;
      const sentence = root.querySelector('[data-value="verdict"]');
      if (sentence.textContent !== text) sentence.textContent = text;
    }

    function draw() {
      root.querySelector('[data-value="epoch"]').textContent = shown().epochs[+epoch.value];
      drawPlot();
      fill();
    }

    follow(picture, true, (x) => {
      const xs = shown().epochs.map((_, k) => xOf(picture.clientWidth)(k));
      epoch.value = nearest(xs, x);
      draw();
    });
    for (const control of [experiment, seed, layer]) {
      control.addEventListener("input", () => {
        choices();
        draw();
      });
    }
    epoch.addEventListener("input", draw);
    choices();
    epoch.value = epoch.max;
    return draw;
  }

  function ready() {
    start("softmax", softmax);
    start("figure-1", figure1);
  }

  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", ready);
  else ready();
})();
