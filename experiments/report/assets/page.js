// What happens on the page: which runs are shown, the controls of the curves, and the passage.

const DATA = JSON.parse(document.getElementById("data").textContent);
DATA.runs.forEach((run, number) => { run.number = number; });
const FULL_SCALE_NATS = 3;
const LOSS_SCALE_NATS = 10;
const LARGEST = 8;
const byId = (id) => document.getElementById(id);
const chosen = (name) => document.querySelector(`input[name="${name}"]:checked`).value;

/** An element with text and children. Text is never read as HTML. */
function make(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// ---- the leaderboard

/** Sorts the rows of each group by a column; those without a value come last. */
function sortLeaderboard(head, label, isAscending) {
  const isText = head.dataset.sort === "text";
  const valueOf = (row) => [...row.querySelectorAll("[data-value]")].find((cell) => cell.dataset.label === label)?.dataset.value;
  for (const body of document.querySelectorAll(".leaderboard tbody")) {
    const rows = [...body.querySelectorAll("tr[data-row]")];
    const order = isAscending ? 1 : -1;
    rows.sort((a, b) => {
      const [x, y] = [valueOf(a), valueOf(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      return order * (isText ? x.localeCompare(y, undefined, { numeric: true }) : Number(x) - Number(y));
    });
    body.append(...rows);
  }
  for (const each of document.querySelectorAll(".leaderboard th[aria-sort]")) each.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", isAscending ? "ascending" : "descending");
}

const heads = [...document.querySelectorAll(".leaderboard th[data-sort]")];
heads.forEach((head, column) => {
  const label = String(column);
  for (const row of document.querySelectorAll("tr[data-row]")) row.querySelectorAll("[data-value]")[column].dataset.label = label;
  const button = make("button", { type: "button" }, ...head.childNodes);
  button.addEventListener("click", () => sortLeaderboard(head, label, head.getAttribute("aria-sort") !== "ascending"));
  head.append(button);
});

// ---- runs and curves

const boxes = [...document.querySelectorAll("input[data-run]")];
const shownRuns = () => DATA.runs.filter((run) => boxes[run.number].checked);

function view() {
  const read = (id, otherwise) => (byId(id).value === "" ? otherwise : Number(byId(id).value));
  return { x: chosen("x"), log: byId("log-x").checked, from: read("from", -Infinity), to: read("to", Infinity) };
}

function curve(run, kind, column, now, change = (values) => values) {
  const source = kind === "held_out" ? run.curves.held_out : run.curves;
  return source[now.x] ? points(run, kind, source[now.x], change(source[column]), now) : [];
}

const canDrag = matchMedia("(pointer: fine)").matches; // on a touch screen, a drag scrolls the page

function lossValues(runs, now) {
  const weight = Number(byId("smoothing").value);
  const loss = chosen("loss");
  return runs.flatMap((run) => [
    ...(loss === "held_out" ? [] : curve(run, "train", "train_loss", now, (all) => smooth(all, weight))),
    ...(loss === "train" ? [] : curve(run, "held_out", "val_loss", now)),
  ]);
}

const CHARTS = [
  {
    name: "loss",
    values: lossValues,
    options: () => ({ height: 360, title: "loss", format: "~f", zoom: canDrag, faint: chosen("loss") === "both" }),
  },
  ...[["learning_rate", 1, "~g"], ["grad_norm", 1, "~g"], ["tokens_per_s", 1, "~s"], ["peak_memory_bytes", 1e-9, "~g"]].map(
    ([name, scale, format]) => ({
      name,
      values: (runs, now) => runs.flatMap((run) => curve(run, "train", name, now, (all) => scaled(all, scale))),
      options: () => ({ height: 150, title: name.replaceAll("_", " "), format, zero: true }),
    }),
  ),
];
const scaled = (values, scale) => values.map((value) => (value === null ? null : value * scale));

// Charts that are out of sight are drawn when they come near. The largest is drawn at once.
const near = new Set(["loss"]);
const outdated = new Set();

async function drawOutdated() {
  const now = view();
  const runs = shownRuns().filter((run) => run.curves);
  for (const chart of CHARTS.filter(({ name }) => near.has(name) && outdated.delete(name))) {
    await draw(byId(`chart-${chart.name}`), chart.values(runs, now), runs, now, chart.options(), chart.name === "loss" && canDrag && zoom);
  }
  const { dataset } = document.body; // for tests and benchmarks
  dataset.drawnMs ??= String(performance.now());
  dataset.drawn = String(Number(dataset.drawn || 0) + 1);
}

let drawing = Promise.resolve();
let isWaiting = false;
function drawSoon() {
  if (isWaiting) return;
  isWaiting = true;
  requestAnimationFrame(() => {
    isWaiting = false;
    drawing = drawing.then(drawOutdated);
  });
}

function redraw() {
  for (const { name } of CHARTS) outdated.add(name);
  drawSoon();
}

const observer = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    const name = target.id.replace("chart-", "");
    if (isIntersecting) near.add(name);
    else near.delete(name);
  }
  if ([...near].some((name) => outdated.has(name))) drawSoon();
}, { rootMargin: "400px" });
for (const { name } of CHARTS.slice(1)) observer.observe(byId(`chart-${name}`));

function zoom(from, to) {
  byId("from").value = from === null ? "" : Number(from.toPrecision(4));
  byId("to").value = to === null ? "" : Number(to.toPrecision(4));
  redraw();
}

function showRuns() {
  for (const article of document.querySelectorAll("[data-of]")) article.hidden = !boxes[Number(article.dataset.of)].checked;
  redraw();
}

boxes.forEach((box, number) => {
  box.checked = DATA.runs[number].shown;
  box.addEventListener("change", showRuns);
});
for (const [id, value] of [["all-runs", true], ["no-runs", false]]) {
  byId(id).addEventListener("click", () => {
    boxes.forEach((box) => { box.checked = value; });
    showRuns();
  });
}
for (const input of document.querySelectorAll('input[name="x"]')) input.addEventListener("change", () => zoom(null, null));
for (const input of document.querySelectorAll('input[name="loss"], #log-x, #from, #to')) input.addEventListener("change", redraw);
byId("smoothing").addEventListener("input", (event) => {
  event.target.nextElementSibling.value = Number(event.target.value).toFixed(2);
  redraw();
});
byId("reset").addEventListener("click", () => zoom(null, null));
byId("chart-loss").addEventListener("dblclick", () => zoom(null, null));
byId("thinned").hidden = !DATA.runs.some((run) => run.curves && run.curves.rows_in_a_point > 1);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { redraw(); if (byId("tokens")) drawPassage(); });
let width = innerWidth;
addEventListener("resize", () => {
  if (innerWidth !== width) redraw(); // the height changes whenever a phone hides its address bar
  width = innerWidth;
});

// ---- the passage

const NOBODY = "-";
const nats = (value) => value.toFixed(2).replace("-", "−");
const visible = (text) => (text.trim() === "" ? text.replaceAll("\n", "⏎").replaceAll(" ", "␣") || "␣" : text.replaceAll("\n", "⏎"));
const percent = (part, whole) => `${Math.round((100 * part) / whole)} %`;
let position = -1;

function models() {
  const a = DATA.runs[Number(byId("model-a").value)];
  const b = byId("model-b").value === NOBODY ? null : DATA.runs[Number(byId("model-b").value)];
  return [a, b];
}

/** Offers as model B those with the passage of model A. */
function offerOthers() {
  const a = DATA.runs[Number(byId("model-a").value)];
  const before = byId("model-b").value;
  const others = DATA.runs.filter((run) => run !== a && run.passage && run.passage.number === a.passage.number);
  const options = others.map((run) => make("option", { value: String(run.number) }, run.name));
  byId("model-b").replaceChildren(...options, make("option", { value: NOBODY }, "none: the loss of model A itself"));
  if (others.some((run) => String(run.number) === before)) byId("model-b").value = before;
}

/** The difference of a token's losses: above 0 where A predicts it better. Without B, the loss of A. */
function difference(a, b, i) {
  const mine = a.passage.losses[i];
  return mine === null ? null : b ? b.passage.losses[i] - mine : mine;
}

function colour(value, isPair) {
  if (value === null) return "transparent";
  const side = value > 0 === isPair ? "--a" : "--b";
  const strength = Math.min(1, Math.abs(value) / (isPair ? FULL_SCALE_NATS : LOSS_SCALE_NATS));
  return `rgb(${cssValue(side)} / ${(0.62 * strength).toFixed(3)})`;
}

function drawPassage() {
  const [a, b] = models();
  const texts = DATA.passages[a.passage.number];
  const values = texts.map((_, i) => difference(a, b, i));
  byId("tokens").replaceChildren(...texts.map((text, i) => {
    const lines = text.split("\n").flatMap((line, n) => (n ? [make("i", {}, "⏎"), `\n${line}`] : [line]));
    const span = make("span", {}, ...lines);
    span.style.backgroundColor = colour(values[i], Boolean(b));
    span.dataset.i = i;
    return span;
  }));
  const scale = b ? FULL_SCALE_NATS : LOSS_SCALE_NATS;
  const stops = [...Array(9).keys()].map((i) => colour(b ? scale * (1 - i / 4) : (scale * i) / 8, Boolean(b)));
  byId("scale-bar").style.background = `linear-gradient(to right, ${stops.join(", ")})`;
  byId("scale-low").textContent = b ? `A better by ${scale} nats or more` : "0 nats";
  byId("scale-high").textContent = b ? `B better by ${scale} nats or more` : `${scale} nats or more`;
  summarize(a, b, values.filter((value) => value !== null));
  byId("largest").replaceChildren(...(b ? [largest(a, b, values, 1), largest(a, b, values, -1)] : []));
  choose(position < texts.length ? position : -1, false);
}

function summarize(a, b, values) {
  const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
  const better = values.filter((value) => value > 0).length;
  byId("passage-summary").replaceChildren(...(values.length === 0 ? ["The passage has no losses."] : b
    ? ["Over these ", String(values.length), " tokens, the mean loss of A, ", make("bdi", { className: "strong" }, a.name), ", is ",
      make("strong", {}, `${nats(Math.abs(mean))} nats ${mean >= 0 ? "lower" : "higher"}`), " than that of B, ",
      make("bdi", { className: "strong" }, b.name), `. A predicts ${percent(better, values.length)} of them better.`]
    : ["The mean loss of ", make("bdi", { className: "strong" }, a.name), " over these ", String(values.length), " tokens is ",
      make("strong", {}, `${nats(mean)} nats`), "."]));
}

/** A table of the tokens that one model predicts better by most; sign: 1 for model A, -1 for model B. */
function largest(a, b, values, sign) {
  const texts = DATA.passages[a.passage.number];
  const order = values.map((_, i) => i).filter((i) => values[i] !== null && sign * values[i] > 0)
    .sort((i, j) => sign * (values[j] - values[i])).slice(0, LARGEST);
  const rows = order.map((i) => {
    const mark = make("mark", {}, visible(texts[i]));
    mark.style.backgroundColor = colour(values[i], true);
    const before = texts.slice(Math.max(0, i - 5), i).join("").replaceAll("\n", " ");
    const cells = [a, b].map((run) => make("td", { className: "number" }, nats(run.passage.losses[i])));
    return make("tr", {}, make("td", {}, `…${before}`, mark), ...cells);
  });
  const head = ["token, after the text before it", "loss of A", "loss of B"];
  const cells = head.map((text, i) => make("th", { className: i ? "number" : "", scope: "col" }, text));
  const title = make("h3", {}, "Better known to ", make("bdi", {}, (sign > 0 ? a : b).name));
  const table = make("table", {}, make("thead", {}, make("tr", {}, ...cells)), make("tbody", {}, ...rows));
  return make("div", {}, title, make("div", { className: "wide" }, table));
}

/** Marks a token, and says its losses. */
function choose(i, isAnnounced = true) {
  const [a, b] = models();
  const spans = byId("tokens").children;
  byId("tokens").querySelector(".chosen")?.classList.remove("chosen");
  position = i;
  if (i < 0) return;
  spans[i].classList.add("chosen");
  const text = visible(DATA.passages[a.passage.number][i]);
  const [mine, theirs] = [a, b].map((run) => run && run.passage.losses[i]);
  const parts = mine === null ? ["the first token has no loss"] : [`A ${nats(mine)} nats`, ...(b ? [`B ${nats(theirs)} nats`, `difference ${nats(theirs - mine)}`] : [])];
  if (isAnnounced) byId("token").replaceChildren(make("bdi", { className: "strong" }, text), `: ${parts.join(", ")}`);
}

if (byId("tokens")) {
  byId("model-a").addEventListener("change", () => { offerOthers(); drawPassage(); });
  byId("model-b").addEventListener("change", drawPassage);
  byId("tokens").addEventListener("click", (event) => {
    const token = event.target.closest("[data-i]");
    if (token) choose(Number(token.dataset.i));
  });
  byId("tokens").addEventListener("keydown", (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10 }[event.key];
    if (!move) return;
    event.preventDefault();
    choose(Math.max(0, Math.min(byId("tokens").children.length - 1, position + move)));
  });
  offerOthers();
  drawPassage();
}
showRuns();
