"use strict";

const WINDOW_S = 5;
const RETRY_MS = 2000;
const LANE_HEIGHT = 18;
const AXIS_HEIGHT = 16;
const LABEL_WIDTH = 92;
const PLOT_WIDTH = 420;
const COMPUTE = "compute";
const WAIT = "exposed wait";
const LEGEND = { compute: "compute", wait: "exposed wait: compute stands still until a fetch ends", fetch: "fetch" };
const SVG = "http://www.w3.org/2000/svg";

const byId = (id) => document.getElementById(id);
const key = byId("key");
const cards = new Map();
let previous = null;

function bytes(value) {
  if (value === null || value === undefined) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let power = 0;
  while (value >= 1024 && power < units.length - 1) {
    value /= 1024;
    power += 1;
  }
  return `${value.toFixed(value < 10 && power > 0 ? 1 : 0)} ${units[power]}`;
}

const count = (value) => (value === null || value === undefined ? "–" : Math.round(value).toLocaleString());
const seconds = (value) => (value === null || value === undefined ? "–" : `${value.toFixed(value < 10 ? 2 : 0)} s`);

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function svgElement(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [attribute, value] of Object.entries(attributes)) made.setAttribute(attribute, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

/* How fast a total of a rank has grown since the last update; a new process starts from nothing. */
function rate(now, rank, field) {
  const before = previous && previous.ranks.find((other) => other.rank === rank.rank);
  const elapsed = previous ? now.now_s - previous.now_s : 0;
  if (!before || before.pid !== rank.pid || elapsed <= 0) return null;
  if (rank[field] === null || before[field] === null) return null;
  return Math.max(0, rank[field] - before[field]) / elapsed;
}

function definitions(list, rows) {
  list.replaceChildren();
  for (const [term, value] of rows) {
    const row = element("div");
    row.append(element("dt", term), element("dd", value));
    list.append(row);
  }
}

function card(rank) {
  if (!cards.has(rank.rank)) {
    const section = element("section");
    section.dataset.rank = rank.rank;
    const title = element("h2", `rank ${rank.rank}`);
    const state = element("span", "", "state");
    title.append(state);
    const reason = element("p", "", "reason");
    const figures = element("dl");
    const timeline = svgElement("svg", { role: "img" });
    const note = element("p", "", "note");
    section.append(title, reason, figures, timeline, note);
    byId("ranks").append(section);
    cards.set(rank.rank, { state, reason, figures, timeline, note });
  }
  return cards.get(rank.rank);
}

function kindOf(lane) {
  if (lane === WAIT) return "wait";
  return lane.startsWith("fetch") ? "fetch" : "compute";
}

function lanesOf(rank) {
  return rank.timeline && Array.isArray(rank.timeline.lanes) ? rank.timeline.lanes : [];
}

/* Why there are no fetch lanes, where there are none. */
function noteOn(rank) {
  const mode = rank.timeline && rank.timeline.fetch_mode;
  if (!mode || lanesOf(rank).some((lane) => kindOf(lane.name) === "fetch")) return "";
  return mode === "direct"
    ? "No fetch lanes: in direct mode experts are read where they lie, and nothing is fetched."
    : `No fetch lanes: in mode ${mode} on this device, copies are not timed one by one.`;
}

/* One row for each lane; exposed wait is drawn over compute, in which it happens. */
function drawTimeline(svg, timeline, lanes) {
  const rows = lanes.filter((lane) => lane.name !== WAIT);
  const height = rows.length * LANE_HEIGHT + AXIS_HEIGHT;
  svg.setAttribute("viewBox", `0 0 ${LABEL_WIDTH + PLOT_WIDTH} ${height}`);
  svg.setAttribute("aria-label", `The last ${WINDOW_S} seconds of ${lanes.map((lane) => lane.name).join(", ")}`);
  svg.replaceChildren();
  if (rows.length === 0) return;
  const start = timeline.now_s - WINDOW_S;
  const x = (time) => LABEL_WIDTH + (Math.min(Math.max(time - start, 0), WINDOW_S) / WINDOW_S) * PLOT_WIDTH;
  rows.forEach((lane, index) => {
    const top = index * LANE_HEIGHT;
    svg.append(svgElement("text", { x: 0, y: top + 13, class: "lane" }, lane.name));
    const track = { x: LABEL_WIDTH, y: top + 2, width: PLOT_WIDTH, height: LANE_HEIGHT - 4, class: "track" };
    svg.append(svgElement("rect", track));
  });
  drawAxis(svg, height);
  const drawn = [...rows, ...lanes.filter((lane) => lane.name === WAIT)];
  for (const lane of drawn) {
    const kind = kindOf(lane.name);
    const row = rows.findIndex((other) => other.name === (kind === "wait" ? COMPUTE : lane.name));
    const inset = kind === "wait" ? 2 : 4;
    for (const [from, to, label] of lane.spans) {
      if (row < 0 || to < start) continue;
      const left = x(from);
      const width = Math.max(x(to) - left, 0.5);
      const y = row * LANE_HEIGHT + inset;
      const bar = svgElement("rect", { x: left, y, width, height: LANE_HEIGHT - 2 * inset, class: kind });
      bar.append(svgElement("title", {}, `${label}: ${((to - from) * 1000).toFixed(1)} ms`));
      svg.append(bar);
    }
  }
}

function drawAxis(svg, height) {
  for (let second = 0; second <= WINDOW_S; second += 1) {
    const at = LABEL_WIDTH + (second / WINDOW_S) * PLOT_WIDTH;
    const anchor = second === 0 ? "start" : second === WINDOW_S ? "end" : "middle";
    svg.append(svgElement("line", { x1: at, x2: at, y1: 0, y2: height - 14 }));
    const text = second === WINDOW_S ? "now" : `-${WINDOW_S - second} s`;
    svg.append(svgElement("text", { x: at, y: height - 2, "text-anchor": anchor }, text));
  }
}

/* Explains the colours that are in use. */
function showLegend(ranks) {
  const used = new Set(ranks.flatMap(lanesOf).map((lane) => kindOf(lane.name)));
  const kinds = Object.keys(LEGEND).filter((kind) => used.has(kind));
  byId("legend").replaceChildren(
    ...kinds.map((kind) => {
      const item = element("li", LEGEND[kind]);
      item.prepend(element("span", "", kind));
      return item;
    }),
  );
}

function showRank(now, rank) {
  const { state, reason, figures, timeline, note } = card(rank);
  state.textContent = rank.state;
  state.dataset.state = rank.state;
  reason.textContent = rank.reason;
  const exposed = rate(now, rank, "exposed_wait_s");
  const share = exposed === null ? "" : ` (now ${(100 * exposed).toFixed(1)} %)`;
  definitions(figures, [
    ["tokens/s", count(rate(now, rank, "generated_tokens"))],
    ["running", `${rank.sequences} of ${rank.window}`],
    ["waiting in the rank", count(rank.waiting)],
    ["outstanding tokens", count(rank.outstanding_tokens)],
    ["resident experts", bytes(rank.resident_expert_bytes)],
    ["staging slots", bytes(rank.staging_bytes)],
    ["dense weights", bytes(rank.dense_bytes)],
    ["process memory", bytes(rank.rss_bytes)],
    ["exposed wait", seconds(rank.exposed_wait_s) + share],
    ["in this state", seconds(rank.state_s)],
    ["restarts", count(rank.restarts)],
    ["last recovery", seconds(rank.recovery_s)],
  ]);
  drawTimeline(timeline, rank.timeline, lanesOf(rank));
  note.textContent = noteOn(rank);
}

function show(now) {
  byId("model").textContent = now.model;
  document.title = `dwdp ${now.model}`;
  const rates = now.ranks.map((rank) => rate(now, rank, "generated_tokens"));
  const known = rates.filter((value) => value !== null);
  definitions(byId("totals"), [
    ["ranks ready", `${now.ranks.filter((rank) => rank.state === "ready").length} of ${now.ranks.length}`],
    ["tokens/s", known.length ? count(known.reduce((sum, value) => sum + value, 0)) : "–"],
    ["waiting in the router", count(now.queued)],
    ["generated since the start", count(now.ranks.reduce((sum, rank) => sum + (rank.generated_tokens || 0), 0))],
  ]);
  const holders = now.expert_memory.holders;
  byId("risk").hidden = !now.expert_memory.at_risk;
  byId("risk").textContent = holders.length
    ? `Rank ${holders[0]} is the last that has the experts' memory. If it is lost before another rank is back, ` +
      "every rank loads from the checkpoint again."
    : "No rank has the experts' memory: every rank loads from the checkpoint.";
  showLegend(now.ranks);
  now.ranks.forEach((rank) => showRank(now, rank));
  previous = now;
}

function setConnection(text, isLost) {
  byId("connection").textContent = text;
  byId("connection").className = isLost ? "lost" : "";
}

/* Not EventSource, which cannot send the key. */
async function follow() {
  const saved = sessionStorage.getItem("dwdp-key");
  const headers = saved ? { Authorization: `Bearer ${saved}` } : {};
  const response = await fetch("page/events", { headers, cache: "no-store" });
  if (response.status === 401) {
    key.hidden = false;
    setConnection("an API key is needed", true);
    return false;
  }
  if (!response.ok) throw new Error(`status ${response.status}`);
  key.hidden = true;
  setConnection("live", false);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the server has ended");
    const events = (pending + value).split("\n\n");
    pending = events.pop();
    for (const event of events) show(JSON.parse(event.replace(/^data: /, "")));
  }
}

async function run() {
  try {
    if (!(await follow())) return;
  } catch (error) {
    setConnection(`not connected (${error.message}), trying again`, true);
    previous = null;
  }
  setTimeout(run, RETRY_MS);
}

key.addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("dwdp-key", byId("key-text").value);
  run();
});

run();
