"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const jobs = data.jobs, done = jobs.filter(job => job.state === "finished");
const kinds = [data, ...data.further]; // of curves; the first one comes with the rest
let kind = data;
const element = id => document.getElementById(id);
const colors = ["#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22",
  "#17becf"];
const color = number => colors[number % colors.length];
const distinct = values => [...new Set(values)];
// null where a value is missing
const mean = values => values.includes(null) ? null : values.reduce((sum, value) => sum + value, 0) / values.length;
const missing = value => value === null || value === undefined;
const scoreScale = () => kind.percent ? 100 : 1;
const score = value => missing(value) ? "" : kind.percent ? (100 * value).toFixed(1) : value.toPrecision(4);

// what a run has of the kind of curve that is shown
const nothing = { clean: null, tolerable: null, bound: "", rates: [], values: [] };
const curveOf = job => job.curves[kind.key] ?? nothing;
const mapsAt = (job, rate) => curveOf(job).values[curveOf(job).rates.indexOf(rate)];

// mean over fault maps, null where this rate was not measured
const scoreAt = (job, rate) => mapsAt(job, rate) ? mean(mapsAt(job, rate)) : null;

// half of the 95 % interval of the mean; 0 for a single value, which says nothing of its spread
function halfInterval(values) {
  if (values.length < 2) return 0;
  const middle = mean(values), freedom = values.length - 1;
  const variance = values.reduce((sum, value) => sum + (value - middle) ** 2, 0) / freedom;
  return (data.student[freedom - 1] ?? 1.96) * Math.sqrt(variance / values.length);
}

function order(a, b) {
  const x = Number(a), y = Number(b);
  return Number.isNaN(x) || Number.isNaN(y) ? String(a).localeCompare(String(b)) : x - y;
}

const valueOf = (job, key) => key === "run" ? job.label : String(job.keys[key] ?? "");
const grouped = key => distinct(done.map(job => valueOf(job, key))).sort(order)
  .map(value => [value, done.filter(job => valueOf(job, key) === value)]);

function layout(x, y, legend = "") {
  const style = getComputedStyle(document.documentElement);
  const ink = style.getPropertyValue("--ink"), line = style.getPropertyValue("--line");
  const axis = title => ({ title: { text: title }, gridcolor: line, zerolinecolor: line, automargin: true });
  return { margin: { t: 34, r: 10, b: 45, l: 55 }, font: { color: ink }, paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)", xaxis: axis(x), yaxis: axis(y), hovermode: "closest",
    modebar: { bgcolor: "rgba(0,0,0,0)", color: line, activecolor: ink },
    legend: { orientation: "h", y: -0.25, title: { text: legend } } };
}

// plotly reads tags in names and texts: those of runs are none
const plain = text => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;");

function draw(id, traces, shape) {
  for (const trace of traces) {
    if (trace.name !== undefined) trace.name = plain(trace.name);
    if (Array.isArray(trace.text)) trace.text = trace.text.map(plain);
  }
  Plotly.react(id, traces, shape, { responsive: true, displaylogo: false });
}

// One value a run if several runs share a group: the spread over runs is what a reader wants; else one a fault map.
function pointsOf(members) {
  const rates = distinct(members.flatMap(job => curveOf(job).rates)).sort((a, b) => a - b);
  return rates.map(rate => {
    const maps = members.map(job => mapsAt(job, rate)).filter(values => values);
    const values = maps.length > 1 ? maps.map(mean) : maps[0];
    return { rate, middle: mean(values), half: halfInterval(values) };
  }).filter(point => point.middle !== null);
}

function drawCurves() {
  const traces = [];
  grouped(element("group").value).forEach(([name, members], number) => {
    const points = pointsOf(members), x = points.map(point => kind.scale * point.rate);
    if (!points.length) return;
    const [low, high] = [kind.bounds[0] ?? -Infinity, kind.bounds[1] ?? Infinity], unit = kind.percent ? " %" : "";
    const edge = sign =>
      points.map(point => scoreScale() * Math.min(high, Math.max(low, point.middle + sign * point.half)));
    traces.push({ x: [...x, ...[...x].reverse()], y: [...edge(1), ...edge(-1).reverse()], fill: "toself",
      mode: "lines", fillcolor: color(number) + "33", line: { width: 0 }, hoverinfo: "skip", showlegend: false, legendgroup: name });
    traces.push({ x, y: points.map(point => scoreScale() * point.middle), name, mode: "lines+markers",
      legendgroup: name, line: { color: color(number) },
      hovertemplate: `%{x:.3g}: %{y:.4g}${unit}<extra>${name}</extra>` });
  });
  draw("curves", traces, layout(kind.axis, kind.score_title, element("group").value));
}

function drawNeurons() {
  const metric = element("metric").value, over = element("over").value;
  const traces = data.layers.map((layer, number) => {
    const points = grouped(over).map(([name, members]) => {
      const values = members.map(job => (job.layers[layer] || {})[metric]).filter(value => value !== undefined);
      return { name, values };
    }).filter(point => point.values.length);
    return { x: points.map(point => Number.isNaN(Number(point.name)) ? point.name : Number(point.name)),
      y: points.map(point => mean(point.values)), name: layer, mode: "lines+markers", line: { color: color(number) },
      error_y: { array: points.map(point => halfInterval(point.values)), color: color(number) } };
  }).filter(trace => trace.x.length);
  draw("neurons", traces, layout(over, metric.replaceAll("_", " ")));
}

function drawTolerance() {
  const metric = element("predictor").value, layer = element("layer").value;
  const traces = grouped(element("group").value).map(([name, members], number) => {
    const shown = members.filter(job => (job.layers[layer] || {})[metric] !== undefined
      && curveOf(job).tolerable !== null);
    return { x: shown.map(job => job.layers[layer][metric]), name,
      y: shown.map(job => kind.scale * curveOf(job).tolerable),
      text: shown.map(job => `${job.label} ${curveOf(job).bound}`), mode: "markers", marker: { color: color(number), size: 9 } };
  }).filter(trace => trace.x.length);
  draw("tolerance", traces, layout(`${metric.replaceAll("_", " ")} of ${layer}`, kind.tolerable,
    element("group").value));
}

function drawPareto() {
  const rate = Number(element("rate").value), sign = kind.lower_is_better ? -1 : 1;
  const points = done.map(job => ({ job, x: curveOf(job).clean, y: scoreAt(job, rate) }))
    .filter(point => point.x !== null && point.y !== null);
  const ahead = (a, b) => sign * (a - b) >= 0;
  const front = points.filter(p =>
    !points.some(q => ahead(q.x, p.x) && ahead(q.y, p.y) && (q.x !== p.x || q.y !== p.y)))
    .sort((a, b) => sign * (a.x - b.x));
  const scale = scoreScale();
  const key = element("group").value, names = grouped(key).map(([name]) => name);
  const traces = names.map((name, number) => {
    const own = points.filter(point => valueOf(point.job, key) === name);
    return { x: own.map(p => scale * p.x), y: own.map(p => scale * p.y), text: own.map(p => p.job.label), name,
      mode: "markers", marker: { color: color(number), size: 9 } };
  });
  traces.unshift({ x: front.map(p => scale * p.x), y: front.map(p => scale * p.y), mode: "lines", name: "Pareto front",
    line: { dash: "dot", color: "#888888", shape: "hv" }, hoverinfo: "skip" });
  draw("pareto", traces, layout(`clean ${kind.score_title}`, `faulty ${kind.score_title}`, key));
}

const columnsOf = () => [
  { title: "run", value: job => job.label, text: true },
  { title: "state", value: job => job.error ? `${job.state}: ${job.error}` : job.state, text: true },
  ...data.keys.map(key => ({ title: key, value: job => job.keys[key] ?? "" })),
  { title: kind.percent ? "clean (%)" : "clean", value: job => curveOf(job).clean, show: score },
  ...kind.rates.map((rate, number) => ({ title: `at ${kind.at[number]}`, show: score,
    value: job => scoreAt(job, rate) })),
  { title: kind.tolerable, value: job => curveOf(job).tolerable, show: (value, job) => missing(value) ? ""
    : `${curveOf(job).bound} ${kind.scale === 100 ? (100 * value).toFixed(1) : value.toPrecision(3)}`.trim() },
  { title: "time (s)", value: job => job.seconds, show: value => value ? value.toFixed(0) : "" },
];
let columns = columnsOf();
let sorted = { column: null, up: true };

function fillTable() {
  const wanted = element("filter").value.toLowerCase();
  const shown = (job, column) => (column.show || String)(column.value(job), job);
  let rows = jobs.filter(job => columns.some(column => shown(job, column).toLowerCase().includes(wanted)));
  if (sorted.column !== null) {
    const value = columns[sorted.column].value;
    rows = [...rows].sort((a, b) => (sorted.up ? 1 : -1) * order(value(a) ?? -Infinity, value(b) ?? -Infinity));
  }
  const body = element("runs").tBodies[0];
  body.replaceChildren(...rows.map(job => {
    const row = document.createElement("tr");
    for (const column of columns) {
      const cell = row.insertCell();
      cell.textContent = shown(job, column);
      if (column.text) cell.className = "text";
    }
    return row;
  }));
}

function buildTable() {
  columns = columnsOf();
  sorted = { column: null, up: true };
  element("runs").tHead.replaceChildren();
  const row = element("runs").tHead.insertRow();
  columns.forEach((column, number) => {
    const head = document.createElement("th");
    head.textContent = column.title;
    head.tabIndex = 0;
    const sort = () => {
      sorted = { column: number, up: sorted.column === number ? !sorted.up : true };
      [...row.cells].forEach(cell => cell.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", sorted.up ? "ascending" : "descending");
      fillTable();
    };
    head.addEventListener("click", sort);
    head.addEventListener("keydown", event => event.key === "Enter" && sort());
    row.append(head);
  });
  fillTable();
}

function show() {
  kind = kinds.find(each => each.called === element("curve").value);
  element("curves-title").textContent = `${kind.score[0].toUpperCase()}${kind.score.slice(1)} over bit errors`;
  element("pareto-title").textContent = `Clean against faulty ${kind.score}`;
  choices("rate", kind.rates.map(String), String(kind.rates[Math.floor(kind.rates.length / 2)]));
  buildTable();
  drawAll();
}

function choices(id, values, chosen, redraw) {
  const select = element(id);
  select.replaceChildren(...values.map(value => new Option(value, value, value === chosen, value === chosen)));
  if (redraw) select.addEventListener("change", redraw);
}

function drawAll() {
  drawCurves();
  drawNeurons();
  drawTolerance();
  drawPareto();
}

const failed = jobs.filter(job => job.state !== "finished");
element("summary").textContent = `${done.length} of ${jobs.length} runs finished. Bands are 95 % intervals of the mean: `
  + "over runs where a group has several, else over fault maps.";
if (failed.length || data.faults.length) {
  const list = document.createElement("ul");
  for (const text of [...failed.map(job => `${job.label}: ${job.state} ${job.error}`), ...data.faults]) {
    const item = document.createElement("li");
    item.textContent = text;
    list.append(item);
  }
  element("missing").append("Missing from the figures:", list);
}
choices("group", [...data.keys, "run"], data.group, () => { drawCurves(); drawTolerance(); drawPareto(); });
choices("metric", data.metrics, data.metrics[0], drawNeurons);
choices("over", [...data.keys, "run"], data.keys.includes("ber.rate") ? "ber.rate" : data.group, drawNeurons);
choices("predictor", data.metrics, data.metrics[0], drawTolerance);
choices("layer", data.layers, data.layers[0], drawTolerance);
choices("curve", kinds.map(each => each.called), data.called, show);
element("curve-choice").hidden = kinds.length < 2;
element("rate").addEventListener("change", drawPareto);
element("filter").addEventListener("input", fillTable);
show();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
