"""Style and script of the page of `draw_html.py`; the script draws what the page's data holds."""

CSS = """
:root { color-scheme: light; --ink: #1f2933; --muted: #6b7785; --rule: #e4e7eb; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f7f9; color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1480px; margin: 0 auto; padding: 28px 20px 56px; }
h1 { font-size: 24px; margin: 0; }
h2 { font-size: 15px; margin: 0 0 6px; }
p { margin: 6px 0 14px; max-width: 110ch; }
.muted { color: var(--muted); font-size: 13px; }
section { background: #fff; border: 1px solid var(--rule); border-radius: 8px;
  padding: 12px 14px; margin-top: 12px; position: relative; }
#reading { position: absolute; right: 14px; top: 12px; margin: 0; font-size: 13px; }
canvas { display: block; width: 100%; cursor: grab; touch-action: pan-y; }
table { border-collapse: collapse; font-size: 14px; background: #fff; margin-bottom: 14px; }
th { color: var(--muted); font-weight: 500; font-size: 13px; }
th, td { padding: 5px 14px; border: 1px solid var(--rule); text-align: right;
  font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; }
.bar { display: flex; flex-wrap: wrap; gap: 6px 16px; align-items: center; margin-top: 8px;
  font-size: 13.5px; }
.bar i { display: inline-block; width: 14px; height: 12px; margin-right: 6px;
  border: 1px solid #0001; vertical-align: -1px; }
button { font: inherit; padding: 2px 10px; border: 1px solid #c5ccd4; border-radius: 5px;
  background: #fff; cursor: pointer; }
#tip { position: fixed; pointer-events: none; background: var(--ink); color: #fff; z-index: 1;
  font-size: 13px; line-height: 1.4; padding: 6px 10px; border-radius: 5px; white-space: pre; }
"""

SCRIPT = r"""
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const LEFT = 58, RIGHT = 12, AXIS = 22, INK = "#1f2933", MUTED = "#7b8794", PALE = "#b8c0c9";
const ROW = Math.max(8, Math.min(24, 560 / data.schedules[0].rows.length));
const span = Math.max(...data.schedules.map(s => s.makespan));
const tip = document.getElementById("tip"), reading = document.getElementById("reading");
let view = [0, span], hovered = null, time = null, waiting = false;
const show = value => String(Number(value.toPrecision(6)));
const panels = data.schedules.map((schedule, i) =>
  panel("panel" + i, schedule.rows.length * ROW, p => drawRows(p, schedule)));
panels.forEach((p, i) => { p.rows = data.schedules[i].rows; });
panels.push(panel("memory", 130, drawMemory));

function panel(id, height, draw) {
  const canvas = document.querySelector("#" + id + " canvas");
  canvas.style.height = height + AXIS + "px";
  const p = { canvas, height, draw, pen: canvas.getContext("2d"), rows: null };
  listen(p);
  return p;
}
function at(p, t) {
  return LEFT + (t - view[0]) / (view[1] - view[0]) * (p.canvas.clientWidth - LEFT - RIGHT);
}
function timeAt(p, x) {
  const share = (x - LEFT) / (p.canvas.clientWidth - LEFT - RIGHT);
  return view[0] + share * (view[1] - view[0]);
}
function redraw() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; panels.forEach(paint); });
}
function paint(p) {
  const width = p.canvas.clientWidth, scale = window.devicePixelRatio || 1;
  if (!width) return;
  p.canvas.width = width * scale;
  p.canvas.height = (p.height + AXIS) * scale;
  const pen = p.pen;
  pen.setTransform(scale, 0, 0, scale, 0, 0);
  pen.font = "11px system-ui, sans-serif";
  pen.textBaseline = "middle";
  pen.save();
  pen.beginPath();
  pen.rect(LEFT, 0, width - LEFT - RIGHT, p.height);
  pen.clip();
  p.draw(p);
  if (time !== null) line(p, time, PALE, []);
  pen.restore();
  labelAxes(p, width);
}
function line(p, t, color, dash) {
  p.pen.strokeStyle = color;
  p.pen.setLineDash(dash);
  p.pen.beginPath();
  p.pen.moveTo(at(p, t), 0);
  p.pen.lineTo(at(p, t), p.height);
  p.pen.stroke();
  p.pen.setLineDash([]);
}
function labelAxes(p, width) {
  const pen = p.pen, step = nice((view[1] - view[0]) / Math.max(2, width / 110));
  pen.fillStyle = MUTED;
  pen.textAlign = "center";
  for (let t = Math.ceil(view[0] / step) * step; t <= view[1]; t += step)
    pen.fillText(show(Math.abs(t) < step / 1e6 ? 0 : t), at(p, t), p.height + 13);
  pen.textAlign = "right";
  const every = Math.ceil(12 / ROW);
  if (p.rows) {
    for (let d = 0; d < p.rows.length; d += every)
      pen.fillText((d ? "" : "device ") + d, LEFT - 6, (d + 0.5) * ROW);
  } else {
    const up = nice(p.top / 4);
    for (let v = 0; v <= p.top; v += up)
      pen.fillText(show(v), LEFT - 6, Math.max(6, height(p, v)));
  }
}
function nice(rough) {
  const power = 10 ** Math.floor(Math.log10(rough));
  return power * [1, 2, 5, 10].find(f => f * power >= rough * (1 - 1e-9));
}
function drawRows(p, schedule) {
  const pen = p.pen;
  pen.textAlign = "center";
  schedule.rows.forEach((row, d) => {
    const y = d * ROW + 1, h = ROW - 2;
    pen.fillStyle = data.bubble;
    pen.fillRect(at(p, 0), y, at(p, schedule.makespan) - at(p, 0), h);
    for (const [token, model, kind, , start, end] of row) {
      if (end < view[0] || start > view[1]) continue;
      const x = at(p, start), w = at(p, end) - x;
      pen.fillStyle = data.models[model].colors[kind];
      pen.fillRect(x, y, w > 4 ? w - 0.8 : w, h);
      const text = w > 7 * token.length + 3 ? token : token.replace(/^.*[FBW]/, "");
      if (ROW < 11 || w < 7 * text.length + 3) continue;
      pen.fillStyle = kind === "F" ? INK : "#fff";
      pen.fillText(text, x + w / 2, y + h / 2 + 0.5);
    }
  });
  if (data.bound !== null) line(p, data.bound, INK, [5, 3]);
}
function height(p, value) { return p.height * (1 - value / p.top); }
function drawMemory(p) {
  const focus = hovered !== null && data.memory[hovered] ? hovered : data.worst;
  const limit = data.limits[focus];
  p.top = 1.1 * Math.max(data.peak, limit ?? 0) || 1;
  for (const device of Object.keys(data.memory)) curve(p, data.memory[device], PALE, 0.7);
  curve(p, data.memory[focus], INK, 1.8);
  if (limit !== null) {
    p.pen.strokeStyle = "#b3261e";
    p.pen.setLineDash([5, 3]);
    p.pen.beginPath();
    p.pen.moveTo(0, height(p, limit));
    p.pen.lineTo(p.canvas.clientWidth, height(p, limit));
    p.pen.stroke();
    p.pen.setLineDash([]);
  }
  const events = data.memory[focus];
  const peak = events.reduce((most, event) => Math.max(most, event[1]), 0);
  reading.textContent = `dark: device ${focus}, `
    + (time === null ? `peak ${show(peak)}` : `${show(valueAt(events, time))} at ${show(time)}`)
    + (limit === null ? "" : `; red: its limit, ${show(limit)}`);
}
function valueAt(events, t) {
  let value = 0;
  for (const [start, next] of events) { if (start > t) break; value = next; }
  return value;
}
function curve(p, events, color, width) {
  const pen = p.pen;
  let y = height(p, 0);
  pen.strokeStyle = color;
  pen.lineWidth = width;
  pen.beginPath();
  pen.moveTo(at(p, 0), y);
  for (const [t, value] of events) {
    pen.lineTo(at(p, t), y);
    y = height(p, value);
    pen.lineTo(at(p, t), y);
  }
  pen.stroke();
  pen.lineWidth = 1;
}
function zoom(factor, center) {
  const size = Math.min(span, Math.max(span / 1e4, (view[1] - view[0]) * factor));
  const start = center - (center - view[0]) / (view[1] - view[0]) * size;
  move(start, size);
}
function move(start, size) {
  start = Math.max(0, Math.min(span - size, start));
  view = [start, start + size];
  redraw();
}
function listen(p) {
  const canvas = p.canvas;
  let dragged = null;
  canvas.addEventListener("wheel", e => {
    e.preventDefault();
    zoom(Math.exp(Math.max(-100, Math.min(100, e.deltaY)) / 250), timeAt(p, e.offsetX));
  }, { passive: false });
  canvas.addEventListener("dblclick", () => move(0, span));
  canvas.addEventListener("pointerdown", e => {
    dragged = [e.offsetX, view[0]];
    canvas.setPointerCapture(e.pointerId);
  });
  canvas.addEventListener("pointerup", () => { dragged = null; });
  canvas.addEventListener("pointercancel", () => { dragged = null; });
  canvas.addEventListener("pointerleave", () => { leave(); });
  canvas.addEventListener("pointermove", e => {
    if (dragged) {
      const size = view[1] - view[0], width = canvas.clientWidth - LEFT - RIGHT;
      move(dragged[1] - (e.offsetX - dragged[0]) / width * size, size);
    }
    hover(p, e);
  });
}
function leave() { hovered = time = null; tip.hidden = true; redraw(); }
function hover(p, e) {
  time = timeAt(p, e.offsetX);
  hovered = p.rows ? Math.floor(e.offsetY / ROW) : hovered;
  const row = p.rows?.[hovered];
  const box = row?.find(each => each[4] <= time && time < each[5]);
  tip.hidden = !box;
  if (box) {
    const [token, model, kind, stage, start, end] = box;
    tip.textContent = `${token}\n${data.kinds[kind]}, ${data.models[model].name}, stage ${stage}\n`
      + `device ${hovered}\nstart ${show(start)}, end ${show(end)}`;
    tip.style.left = Math.min(e.clientX + 14, window.innerWidth - tip.offsetWidth - 8) + "px";
    tip.style.top = Math.min(e.clientY + 14, window.innerHeight - tip.offsetHeight - 8) + "px";
  }
  redraw();
}
for (const button of document.querySelectorAll("[data-zoom]"))
  button.addEventListener("click", () => {
    const factor = Number(button.dataset.zoom);
    if (factor) zoom(factor, (view[0] + view[1]) / 2); else move(0, span);
  });
for (const toggle of document.querySelectorAll("[data-panel]"))
  toggle.addEventListener("change", () => {
    document.getElementById("panel" + toggle.dataset.panel).hidden = !toggle.checked;
    redraw();
  });
window.addEventListener("resize", redraw);
redraw();
"""
