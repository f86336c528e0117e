// Charts of curves and their bands, drawn by uPlot. Text from data enters through textContent or a canvas, never as markup.
"use strict";
const data = JSON.parse(document.getElementById("charts").textContent);
const get = id => document.getElementById(id);
const colour = name => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
const visible = data.groups.map(() => true);
const FONT = "12px system-ui, -apple-system, sans-serif", HEIGHT = 250, ROWS = 12, MARKED = 40;
let charts = [], column = 0, range = null, full = [0, 1], strong = -1, active = null, last = null;

function decimals(step) {  // that an axis with ticks so far apart needs
  let places = 0;
  while (places < 9 && Math.abs(step * 10 ** places - Math.round(step * 10 ** places)) > 1e-6) places++;
  return places;
}
function number(value, places) {
  const size = Math.abs(value);
  const text = size >= 1e7 || (size > 0 && size < 1e-4) ? value.toExponential(places === undefined ? 3 : 2).replace(/\.?0+e\+?/, "e")
    : places !== undefined ? value.toLocaleString("en", {minimumFractionDigits: places, maximumFractionDigits: places})
      : value.toLocaleString("en", {maximumSignificantDigits: 4});
  return text.replaceAll("-", "−");
}
function nearest(x, value) {
  let low = 0, high = x.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (x[middle] < value) low = middle; else high = middle;
  }
  return value - x[low] <= x[high] - value ? low : high;
}
function element(tag, className, text) {
  const made = document.createElement(tag);
  made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

// One chart

function options(panel, curves, width) {
  const faint = group => strong >= 0 && strong !== group;
  const series = [{}], bands = [];
  for (const {group, x, low} of curves) {
    const {colour: own, dash} = data.groups[group];
    const stroke = () => own + (faint(group) ? "40" : "");
    const edge = {stroke, width: 0, spanGaps: true, points: {show: false}, show: visible[group]};
    const marked = panel.points && x.length <= MARKED;
    series.push({stroke, dash, width: 2, spanGaps: true, show: visible[group],
      points: {show: marked, size: 5, fill: stroke, stroke}});
    if (low) {
      series.push(edge, edge);
      bands.push({series: [series.length - 1, series.length - 2], fill: () => own + (faint(group) ? "0d" : "33")});
    }
  }
  const axis = {stroke: () => colour("soft"), font: FONT, labelFont: FONT, labelSize: 20, labelGap: 2, gap: 4,
    grid: {stroke: () => colour("line"), width: 1}, ticks: {stroke: () => colour("line"), width: 1, size: 4}};
  const written = (u, splits, _, __, step) => splits.map(value => number(value, decimals(step)));
  const marks = range ? [] : panel.marks.map(([value]) => value);  // in a part of the curves they would flatten it
  return {
    width, height: HEIGHT, series, bands, legend: {show: false}, padding: [8, 12, 0, 0],
    scales: {
      x: {time: false, range: () => range || full},
      y: {range: (u, low, high) => {
        const ends = [low, high, ...(range ? [] : marks)].filter(value => value !== null && Number.isFinite(value));
        if (!ends.length) return [0, 1];
        const [from, to] = [Math.min(...ends), Math.max(...ends)], pad = (to - from) * 0.06 || Math.abs(to) * 0.05 || 0.5;
        return [from - pad, to + pad];
      }},
    },
    axes: [
      {...axis, size: 28, label: data.columns[column].label, space: 60, values: written},
      {...axis, label: panel.unit, values: written,
        size: (u, values) => 14 + 7 * Math.max(2, ...(values || []).map(text => text.length))},
    ],
    cursor: {
      sync: {key: "curves", setSeries: false, scales: ["x", null], filters: {pub: type => type === "mousemove" || type === "mouseleave"}},
      drag: {x: true, y: false, setScale: false},
      points: {show: false},
      bind: {dblclick: () => () => zoom(null)},
    },
    hooks: {
      draw: [u => drawMarks(u, panel)],
      setCursor: [u => tell(u)],
      setSelect: [u => {
        if (u.select.width > 4) zoom([u.posToVal(u.select.left, "x"), u.posToVal(u.select.left + u.select.width, "x")]);
        u.setSelect({left: 0, top: 0, width: 0, height: 0}, false);
      }],
    },
  };
}
function drawMarks(u, panel) {
  const {left, top, width, height} = u.bbox, ratio = uPlot.pxRatio;
  u.ctx.save();
  u.ctx.fillStyle = colour("soft");
  u.ctx.font = `${11 * ratio}px system-ui, sans-serif`;
  for (const [value, label] of panel.marks) {
    const y = u.valToPos(value, "y", true);
    if (!(y >= top && y <= top + height)) continue;
    u.ctx.strokeStyle = u.ctx.fillStyle;
    u.ctx.lineWidth = ratio;
    u.ctx.setLineDash([5 * ratio, 4 * ratio]);
    u.ctx.beginPath();
    u.ctx.moveTo(left, y);
    u.ctx.lineTo(left + width, y);
    u.ctx.stroke();
    u.ctx.textAlign = "right";
    u.ctx.textBaseline = y - top > 20 * ratio ? "bottom" : "top";
    u.ctx.fillText(label, left + width - 2 * ratio, y + (y - top > 20 * ratio ? -2 : 2) * ratio);
  }
  u.ctx.restore();
}
function read(chart, x, y) {  // what each group measured nearest to x
  const [from, to] = range || full, near = (to - from) * 0.02;
  const there = ({group, x: xs}) => visible[group] && x > xs[0] - near && x < xs[xs.length - 1] + near;
  const rows = chart.curves.filter(there).map(curve => {
    const at = nearest(curve.x, x);
    return {group: curve.group, x: curve.x[at], mean: curve.mean[at], low: curve.low && curve.low[at], high: curve.high && curve.high[at]};
  }).filter(row => row.mean !== null);
  const left = Math.max(0, rows.length - ROWS);
  if (left) rows.sort((a, b) => Math.abs(a.mean - y) - Math.abs(b.mean - y)).length = ROWS;
  return [rows.sort((a, b) => b.mean - a.mean), left];
}
const values = row => number(row.mean) + (row.low !== null && row.low !== undefined ? ` [${number(row.low)}, ${number(row.high)}]` : "");
function tell(u) {
  const chart = charts.find(one => one.u === u);
  if (!chart) return;
  const {left, top} = u.cursor;
  chart.tip.hidden = chart !== active || !(left >= 0);
  if (chart.tip.hidden) return;
  const x = last = u.posToVal(left, "x");
  const [rows, more] = read(chart, x, u.posToVal(top, "y"));
  const same = rows.length && rows.every(row => row.x === rows[0].x);
  const at = same ? number(rows[0].x) : "about " + number(Number(x.toPrecision(3)));
  chart.tip.replaceChildren(element("strong", "", `${at} ${data.columns[column].label}`));
  for (const row of rows) {
    const line = element("div", "");
    const swatch = element("span", "swatch");
    swatch.style.background = data.groups[row.group].colour;
    line.append(swatch, `${data.groups[row.group].label ? data.groups[row.group].label + ": " : ""}${values(row)}`);
    if (row.group === strong) line.className = "strong";
    chart.tip.append(line);
  }
  if (more) chart.tip.append(element("div", "soft", `and ${more} more further away`));
  const space = document.documentElement.clientWidth - chart.place.getBoundingClientRect().left - 8;
  chart.tip.style.left = `${Math.min(u.over.offsetLeft + left, space - chart.tip.offsetWidth)}px`;
}
function build(place) {
  const panel = data.panels[place.dataset.panel], given = panel.curves[column];
  const figure = place.parentElement;
  figure.hidden = !given;
  if (!given) return;
  const curves = given.flatMap((curve, group) => curve ? [{group, x: curve[0], mean: curve[1], low: curve[2], high: curve[3]}] : []);
  const tables = curves.map(({x, mean, low, high}) => low ? [x, mean, low, high] : [x, mean]);
  const tip = element("div", "tip");
  tip.hidden = true;
  place.replaceChildren();
  place.setAttribute("aria-label", `${panel.title} by ${data.columns[column].label}. Arrow keys read values, + and − zoom, 0 shows all.`);
  figure.querySelector("figcaption").textContent = panel.captions[column];
  const u = new uPlot(options(panel, curves, place.clientWidth), uPlot.join(tables), place);
  place.append(tip);
  charts.push({u, tip, place, curves, panel});
}

// All charts

const places = [...document.querySelectorAll(".chart")];
function rebuild() {
  for (const {u} of charts) u.destroy();
  charts = [];
  active = last = range = null;
  const ends = data.panels.flatMap(panel => (panel.curves[column] || []).flatMap(curve => curve ? [curve[0][0], curve[0].at(-1)] : []));
  full = ends.length ? [Math.min(...ends), Math.max(...ends)] : [0, 1];
  if (full[0] === full[1]) full = [full[0] - 0.5, full[1] + 0.5];
  places.forEach(build);
  get("all").disabled = true;
}
function zoom(next) {
  if (next) {
    next = [Math.max(next[0], full[0]), Math.min(next[1], full[1])];
    if (!(next[1] - next[0] > (full[1] - full[0]) / 1e4)) return;
    if (next[0] <= full[0] && next[1] >= full[1]) next = null;
  }
  range = next;
  get("all").disabled = !range;
  for (const {u} of charts) u.setScale("x", {min: (range || full)[0], max: (range || full)[1]});
}
function by(factor) {
  const [low, high] = range || full, width = (high - low) * factor;
  const middle = last !== null && last >= low && last <= high ? last : (low + high) / 2, share = (middle - low) / (high - low);
  zoom([middle - share * width, middle + (1 - share) * width]);
}
function update() {  // which groups are seen, and which stands out
  for (const {u, curves} of charts) {
    u.batch(() => {
      let at = 1;
      for (const {group, low} of curves) {
        for (let end = at + (low ? 3 : 1), first = at; at < end; at++) {
          if (u.series[at].show !== visible[group]) u.setSeries(at, {show: visible[group]});
          u.series[at].width = at === first ? (strong === group ? 3.5 : 2) : 0;
        }
      }
    });
    u.redraw(false, false);
  }
}
const boxes = [...document.querySelectorAll(".key input")];
boxes.forEach((box, group) => {
  box.checked = true;
  box.addEventListener("change", () => { visible[group] = box.checked; update(); });
  const label = box.parentElement;
  for (const [event, group_] of [["mouseenter", group], ["focusin", group], ["mouseleave", -1], ["focusout", -1]]) {
    label.addEventListener(event, () => { strong = group_; update(); });
  }
});
function every(shown) {
  boxes.forEach((box, group) => { box.checked = visible[group] = shown; });
  update();
}
if (boxes.length) {
  get("every").addEventListener("click", () => every(true));
  get("none").addEventListener("click", () => every(false));
}
get("in").addEventListener("click", () => by(0.5));
get("out").addEventListener("click", () => by(2));
get("all").addEventListener("click", () => zoom(null));
for (const input of document.querySelectorAll("input[name=column]")) {
  input.addEventListener("change", () => { column = Number(input.value); rebuild(); });
}
for (const place of places) {
  const chart = () => charts.find(one => one.place === place);
  const leave = () => { active = null; const own = chart(); if (own) own.tip.hidden = true; };
  place.addEventListener("mouseenter", () => { active = chart() || null; });
  place.addEventListener("mouseleave", leave);
  place.addEventListener("focus", () => { active = chart() || null; });
  place.addEventListener("blur", leave);
  place.addEventListener("keydown", event => {
    const own = chart();
    if (!own || event.ctrlKey || event.metaKey || event.altKey) return;
    const [low, high] = range || full, xs = own.u.data[0].filter(x => x >= low && x <= high);
    const at = last === null ? -1 : nearest(xs, last);
    const to = {ArrowLeft: Math.max(at - 1, 0), ArrowRight: Math.min(at + 1, xs.length - 1), Home: 0, End: xs.length - 1}[event.key];
    if (to !== undefined && xs.length) {
      active = own;
      own.u.setCursor({left: own.u.valToPos(xs[to], "x"), top: own.u.over.clientHeight / 2});
      last = xs[to];
      get("said").textContent = [...own.tip.children].map(line => line.textContent).join("; ");
    } else if (event.key === "+" || event.key === "=") by(0.5);
    else if (event.key === "-") by(2);
    else if (event.key === "0") zoom(null);
    else if (event.key === "Escape") own.tip.hidden = true;
    else return;
    event.preventDefault();
  });
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => update());
let width = 0;
new ResizeObserver(() => {
  if (innerWidth === width) return;
  width = innerWidth;
  for (const {u, place} of charts) u.setSize({width: place.clientWidth, height: HEIGHT});
}).observe(document.body);
addEventListener("beforeprint", () => { for (const {u, place} of charts) u.setSize({width: place.clientWidth, height: HEIGHT}); });
rebuild();
