"use strict";
let data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const TITLES = {
  "loss": "Loss", "evaluation/loss": "Held-out loss", "noise_levels/loss/…": "Loss by noise level",
  "evaluation/loss/…": "Held-out loss by dataset and noise level", "learning_rate": "Learning rate",
  "grad_norm": "Gradient norm", "seconds": "Seconds per step", "metrics/samples_per_second": "Samples per second",
  "metrics/tokens_per_second": "Tokens per second", "peak_memory_bytes": "Peak memory",
};
const ORDER = Object.keys(TITLES);

function node(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function shape(tag, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function number(value, name = "") {
  if (/bytes/.test(name)) return (value / 2 ** 30).toPrecision(3) + " GiB";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2).replace("e+", "e");
  return String(Number(value.toPrecision(4)));
}

function duration(seconds) {
  const [hours, minutes] = [Math.floor(seconds / 3600), Math.floor(seconds / 60) % 60];
  return hours ? `${hours} h ${minutes} min` : minutes ? `${minutes} min` : `${Math.round(seconds)} s`;
}

const moment = (seconds) => new Date(seconds * 1000).toLocaleString();

// Charts: names of the log, grouped by what belongs into one picture.
function groups(names) {
  const found = new Map();
  for (const name of names) {
    const [base, variant] = name.split("@");
    const parts = base.split("/");
    const many = parts.length > 2;
    const key = many ? parts.slice(0, 2).join("/") + "/…" : base;
    const label = (many ? parts.slice(2).join("/") : variant ? "" : "trained") + (variant ? ` ${variant}` : "");
    if (!found.has(key)) found.set(key, []);
    found.get(key).push({ name, label: label.trim() });
  }
  const rank = (key) => (ORDER.indexOf(key) + 1 || 1000);
  return [...found].sort(([a], [b]) => rank(a) - rank(b) || a.localeCompare(b));
}

// A running mean, divided by the weights it has seen, so that it does not begin at zero.
function smoothed(values, keep) {
  let sum = 0, weight = 0;
  return values.map((value) => {
    sum = keep * sum + (1 - keep) * value;
    weight = keep * weight + (1 - keep);
    return sum / weight;
  });
}

function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((each) => each * power).find((each) => each >= rough);
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-9; at += step) found.push(at);
  return found;
}

const path = (xs, ys) => xs.map((x, at) => `${at ? "L" : "M"}${x.toFixed(1)} ${ys[at].toFixed(1)}`).join("");

function chart(into, key, members) {
  const figure = node("figure", { "data-chart": key }, node("figcaption", {}, TITLES[key] || key));
  into.append(figure);
  const width = Math.max(200, figure.clientWidth - 20), height = 190, left = 58, bottom = 22, top = 8;
  const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": TITLES[key] || key });
  const keep = Number($("smoothing").value);
  const series = members.map(({ name, label }, at) => {
    const curve = data.curves[name];
    const noisy = curve.mean.length > 20 && keep > 0 && key !== "learning_rate";
    const colour = members.length === 1 ? "var(--accent)" : `hsl(${Math.round((at * 300) / members.length)} 75% var(--l))`;
    return { name, label, colour, curve, noisy, line: noisy ? smoothed(curve.mean, keep) : curve.mean };
  });
  const all = (pick) => series.flatMap(pick);
  const extreme = (values) => values.reduce(([a, b], each) => [Math.min(a, each), Math.max(b, each)], [Infinity, -Infinity]);
  let [first, last] = extreme(all(({ curve }) => [curve.step[0], curve.step[curve.step.length - 1]]));
  let [low, high] = extreme(all(({ curve, line }) => [...line, ...(members.length === 1 ? curve.mean : [])]));
  if (first === last) { first -= 1; last += 1; }
  if (high - low <= 1e-5 * Math.max(Math.abs(low), Math.abs(high))) { const room = Math.abs(low) / 10 || 1; low -= room; high += room; }
  const x = (step) => left + ((step - first) / (last - first)) * (width - left - 6);
  const y = (value) => top + (1 - (value - low) / (high - low)) * (height - bottom - top);
  const inside = (value) => y(Math.min(high, Math.max(low, value)));
  for (const at of ticks(low, high, 4)) {
    svg.append(shape("line", { class: "grid", x1: left, x2: width - 6, y1: y(at), y2: y(at) }));
    const text = shape("text", { x: left - 5, y: y(at) + 4, "text-anchor": "end" });
    text.textContent = number(at, key);
    svg.append(text);
  }
  for (const at of ticks(first, last, Math.max(2, width / 110)).filter(Number.isInteger)) {
    const text = shape("text", { x: x(at), y: height - 6, "text-anchor": "middle" });
    text.textContent = at;
    svg.append(text);
  }
  for (const { curve, line, colour, noisy } of series) {
    const xs = curve.step.map(x);
    if (curve.low && members.length === 1) {
      const around = path([...xs, ...[...xs].reverse()], [...curve.high.map(inside), ...curve.low.map(inside).reverse()]);
      svg.append(shape("path", { class: "band", d: around + "Z", style: `fill:${colour}` }));
    }
    if (noisy && members.length === 1) svg.append(shape("path", { class: "raw", d: path(xs, curve.mean.map(y)), style: `stroke:${colour}` }));
    svg.append(shape("path", { class: "smooth", d: path(xs, line.map(y)), style: `stroke:${colour}` }));
    if (xs.length < 40) xs.forEach((at, index) => svg.append(shape("circle", { cx: at, cy: y(line[index]), r: 2.2, style: `fill:${colour}` })));
  }
  const cursor = shape("line", { class: "grid", y1: top, y2: height - bottom, visibility: "hidden" });
  svg.append(cursor);
  const legend = node("div", { class: "legend" });
  const told = (step) => legend.replaceChildren(...(step === null ? [] : [node("span", {}, `step ${step}`)]), ...series.map((each) => {
    const at = step === null ? each.curve.step.length - 1 : nearest(each.curve.step, step);
    const swatch = node("i", { style: `background:${each.colour}` });
    return node("span", {}, swatch, `${members.length > 1 || each.label !== "trained" ? each.label + " " : ""}${number(each.curve.mean[at], key)}`);
  }));
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const wanted = first + (((event.clientX - box.left) * width) / box.width - left) * (last - first) / (width - left - 6);
    const steps = series[0].curve.step, step = steps[nearest(steps, wanted)];
    cursor.setAttribute("x1", x(step)); cursor.setAttribute("x2", x(step)); cursor.setAttribute("visibility", "visible");
    told(step);
  });
  svg.addEventListener("pointerleave", () => { cursor.setAttribute("visibility", "hidden"); told(null); });
  told(null);
  figure.append(svg, legend);
}

function nearest(steps, wanted) {
  let from = 0, to = steps.length - 1;
  while (to - from > 1) { const middle = (from + to) >> 1; if (steps[middle] < wanted) from = middle; else to = middle; }
  return Math.abs(steps[from] - wanted) <= Math.abs(steps[to] - wanted) ? from : to;
}

function drawCharts() {
  $("smoothed").textContent = $("smoothing").value;
  const found = groups(Object.keys(data.curves));
  const main = ([key]) => key in TITLES || /loss|bytes/.test(key);
  $("charts").replaceChildren();
  $("more").replaceChildren();
  for (const [key, members] of found.filter(main)) chart($("charts"), key, members);
  if (!found.length) $("charts").append("Nothing is logged yet.");
  const others = found.filter((each) => !main(each));
  $("others").hidden = !others.length;
  if ($("others").open) for (const [key, members] of others) chart($("more"), key, members);
  if (data.not_drawn) $("more").append(`${data.not_drawn} more names stand in train.jsonl.`);
}

// Clips: a card for each prompt at the step of the slider, and a table of all steps.
const steps = () => [...new Set(data.media.rows.flatMap((row) => Object.keys(row.cells).map(Number)))].sort((a, b) => a - b);

function drawClips() {
  const all = steps();
  $("validation").hidden = !all.length && !data.media.sheets.length;
  if (!all.length) return;
  const chosen = all[Number($("step").value)];
  $("shown").textContent = `${chosen}`;
  $("clips").replaceChildren(...data.media.rows.map((row) => {
    const at = Object.keys(row.cells).map(Number).filter((step) => step <= chosen).sort((a, b) => b - a)[0];
    const card = node("figure", {}, node("figcaption", {}, row.name));
    if (at === undefined) return card.append(node("p", {}, "not rendered yet")), card;
    const cell = row.cells[at];
    card.append(cell.video ? video(cell) : node("img", { src: cell.picture || cell.previews, alt: row.name, loading: "lazy" }));
    card.append(node("p", {}, (at === chosen ? "" : `step ${at}. `) + row.prompt));
    if (cell.previews) card.append(node("p", {}, node("a", { href: cell.previews }, "While it was sampled")));
    return card;
  }));
}

function video(cell) {
  const made = node("video", { src: cell.video, controls: "", loop: "", playsinline: "", preload: "metadata" });
  if (cell.picture) made.poster = cell.picture;
  made.muted = true;
  return made;
}

function drawGrid() {
  const all = steps();
  const head = node("tr", {}, node("th", {}, "prompt"), ...all.map((step) => node("th", {}, `${step}`)));
  $("grid").replaceChildren(head, ...data.media.rows.map((row) => node("tr", {}, node("th", {}, row.name), ...all.map((step, at) => {
    const cell = row.cells[step];
    if (!cell) return node("td");
    const inner = cell.picture ? node("img", { src: cell.picture, alt: `${row.name}, step ${step}`, loading: "lazy" }) : "clip";
    const button = node("button", { type: "button", "aria-label": `show step ${step}` }, inner);
    button.addEventListener("click", () => { $("step").value = at; drawClips(); $("validation").scrollIntoView(); });
    return node("td", {}, button);
  }))));
}

function drawMedia() {
  const last = Math.max(0, steps().length - 1), slider = $("step");
  const follow = Number(slider.value) === Number(slider.max) || !slider.dataset.used;
  slider.max = last;
  if (follow) slider.value = last;
  slider.dataset.used = "yes";
  slider.disabled = last === 0;
  drawClips();
  if ($("grid").closest("details").open) drawGrid();
  drawSheets();
}

function drawSheets() {
  $("sheets").replaceChildren(...data.media.sheets.flatMap(({ name, address }, at) => [at ? ", " : "Contact sheets: ", node("a", { href: address }, name)]));
}

function drawFacts() {
  const { facts, latest } = data, total = facts.total_steps, step = latest.step || 0;
  $("state").textContent = [data.state, facts.model && facts.model.flavour, data.log_written && `last line of the log ${moment(data.log_written)}`, `page of ${moment(data.written)}`].filter(Boolean).join(" · ");
  const left = data.state === "running" && total && step && data.curves.seconds ? duration(data.curves.seconds.mean.slice(-50).reduce((sum, each, _, of) => sum + each / of.length, 0) * (total - step)) : null;
  const shown = [["step", total ? `${step} of ${total}` : `${step}`], ["epoch", latest.epoch], ["loss", latest.loss], ["learning rate", latest.learning_rate],
    ["held-out loss", (data.curves["evaluation/loss"] || { mean: [] }).mean.slice(-1)[0]], ["samples per second", latest["metrics/samples_per_second"]],
    ["peak memory", latest.peak_memory_bytes && number(latest.peak_memory_bytes, "bytes")], ["time in steps", duration(data.seconds)], ["steps left take", left]];
  $("numbers").replaceChildren(...shown.filter(([, value]) => value !== undefined && value !== null && value !== 0).map(([name, value]) =>
    node("div", {}, node("b", {}, typeof value === "number" ? number(value) : value), name)));
  $("events").replaceChildren(...[...data.events].reverse().map((event) => node("li", { class: event.kind },
    node("time", {}, moment(event.time)), node("b", {}, event.kind), event.text)));
  if (!data.events.length) $("events").append(node("li", {}, "None were kept."));
  $("data-report").replaceChildren(data.data_report ? node("a", { href: data.data_report }, "What of the data is used, and why not the rest") : "There is no data report.");
  const set = new Set(facts.set || []), config = Object.entries(facts.config || {});
  config.sort(([a], [b]) => set.has(b) - set.has(a) || a.localeCompare(b));
  $("settings").replaceChildren(...config.map(([name, value]) => node("tr", {}, node(set.has(name) ? "th" : "td", {}, name),
    node("td", {}, typeof value === "string" ? value : JSON.stringify(value)))));
}

// Device memory of the first step: what was predicted, part by part, and a line where the measured peak is.
function drawMemory() {
  const { memory } = data, section = $("memory");
  section.hidden = !memory;
  if (!memory) return;
  const parts = Object.entries(memory.predicted).sort(([, a], [, b]) => b - a);
  const total = parts.reduce((sum, [, size]) => sum + size, 0), widest = Math.max(total, memory.measured || 0) || 1;
  const bar = parts.map(([name, size], at) => node("span", { title: `${name}: ${number(size, "bytes")}`,
    style: `width:${100 * size / widest}%;background:hsl(${(at * 137) % 360} 55% var(--l))` }));
  if (memory.measured) bar.push(node("i", { style: `left:${100 * memory.measured / widest}%`, title: `measured: ${number(memory.measured, "bytes")}` }));
  $("parts").replaceChildren(...bar);
  const named = parts.map(([name, size], at) => node("span", { class: "part" }, node("i", { style: `background:hsl(${(at * 137) % 360} 55% var(--l))` }), `${name} ${number(size, "bytes")}`));
  const measured = memory.measured ? `; measured ${number(memory.measured, "bytes")}` : "; this device does not count it";
  $("parts-named").replaceChildren(`First step: ${number(total, "bytes")} predicted${measured}. `, ...named);
}

function draw() {
  drawMemory();
  drawFacts();
  drawCharts();
  drawMedia();
}

$("smoothing").addEventListener("input", drawCharts);
$("others").addEventListener("toggle", drawCharts);
$("step").addEventListener("input", drawClips);
$("grid").closest("details").addEventListener("toggle", drawGrid);
let drawnAt = window.innerWidth;
window.addEventListener("resize", () => { if (window.innerWidth !== drawnAt) { drawnAt = window.innerWidth; drawCharts(); } });
draw();

// Served by `tuner report --serve`: new numbers come by themselves. From the disk, reload the page.
async function follow() {
  try {
    const answer = await fetch("data.json", { cache: "no-store" });
    if (!answer.ok) return;
    const media = JSON.stringify(data.media);
    data = await answer.json();
    drawMemory();
    drawFacts();
    drawCharts();
    if (JSON.stringify(data.media) !== media) drawMedia();
  } catch { /* the server is gone: what is drawn stays */ }
}
if (location.protocol.startsWith("http")) setInterval(follow, 5000);
