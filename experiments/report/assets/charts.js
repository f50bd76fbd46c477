"use strict";
// Draws curves of runs with Vega-Lite. A chart is drawn anew whenever a control, the colour scheme or the width changes.

const KINDS = ["train", "held_out"];
const DASHES = [[1, 0], [6, 3], [2, 2]];

/** A colour or another custom property of page.css, as it is in the current colour scheme. */
function cssValue(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

/** Exponential moving average without the pull towards 0 of its start: Kingma and Ba, 2014, section 3. */
function smooth(values, weight) {
  let sum = 0;
  let norm = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = weight * sum + (1 - weight) * value;
    norm = weight * norm + (1 - weight);
    return sum / norm;
  });
}

/** The points of a curve with x in the zoomed range; and above 0 for a log scale. */
function points(run, kind, xs, ys, view) {
  const found = [];
  for (let i = 0; i < (xs || []).length; i++) {
    const x = xs[i];
    const y = ys[i];
    if (x === null || y === null || x < view.from || x > view.to || (view.log && x <= 0)) continue;
    found.push({ run: run.name, key: String(run.number), kind, x, y });
  }
  return found;
}

const BUDGET_TITLES = { step: "step", tokens: "tokens", seconds: "seconds", flops: "FLOPs" };

function specification(values, runs, view, options) {
  const shared = {
    x: {
      field: "x", type: "quantitative", title: BUDGET_TITLES[view.x],
      scale: { type: view.log ? "log" : "linear", zero: false, nice: false },
      axis: { format: "~s", tickCount: 7, labelOverlap: true },
    },
    y: {
      field: "y", type: "quantitative", title: null,
      scale: { zero: Boolean(options.zero), nice: true }, axis: { format: options.format || "~s", tickCount: 5 },
    },
    detail: { field: "key" },
    color: {
      field: "key", type: "nominal", legend: null,
      scale: { domain: runs.map((run) => String(run.number)), range: runs.map((run) => cssValue(`--hue-${run.hue}`)) },
    },
    strokeDash: {
      field: "key", type: "nominal", legend: null,
      scale: { domain: runs.map((run) => String(run.number)), range: runs.map((run) => DASHES[run.dash]) },
    },
  };
  const tooltip = [
    { field: "run", title: "run" },
    { field: "x", title: BUDGET_TITLES[view.x], format: ",.4~g" },
    { field: "y", title: options.title, format: ",.4~f" },
  ];
  const layers = {
    train: [{ mark: { type: "line", clip: true, strokeWidth: options.faint ? 1.2 : 1.6, opacity: options.faint ? 0.55 : 0.95 } }],
    held_out: [
      { mark: { type: "line", clip: true, strokeWidth: 2.2 } },
      { mark: { type: "point", clip: true, filled: true, opacity: 1, size: 30 }, encoding: { tooltip } },
    ],
  };
  const quiet = cssValue("--quiet");
  const layer = KINDS.flatMap((kind) => {
    const rows = values.filter((value) => value.kind === kind);
    return rows.length ? layers[kind].map((each) => ({ data: { name: kind, values: rows }, ...each })) : [];
  });
  if (options.zoom) layer[0].params = [{ name: "zoom", select: { type: "interval", encodings: ["x"] } }];
  return {
    $schema: "https://vega.github.io/schema/vega-lite/v6.json",
    width: "container", height: options.height, autosize: { type: "fit", contains: "padding" },
    background: null, encoding: shared, layer,
    config: {
      font: "system-ui, sans-serif", view: { stroke: null },
      axis: {
        labelColor: quiet, titleColor: quiet, labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal",
        gridColor: cssValue("--grid"), domain: false, ticks: false, labelPadding: 6, titlePadding: 8,
      },
    },
  };
}

// ast: Vega interprets its expressions, because the page forbids `eval`. logLevel 1: errors only.
const OPTIONS = { actions: false, ast: true, logLevel: 1, renderer: "canvas", tooltip: { theme: "custom" } };
const drawn = new Map();

/** Draws a chart into an element. onZoom gets the range that a drag across the chart chose. */
async function draw(element, values, runs, view, options, onZoom) {
  drawn.get(element)?.finalize();
  drawn.delete(element);
  element.classList.toggle("empty", values.length === 0);
  if (values.length === 0) {
    element.textContent = runs.length ? "None of the shown runs has these numbers." : "No run is shown.";
    return;
  }
  const chart = specification(values, runs, view, options);
  const result = await vegaEmbed(element, chart, OPTIONS);
  drawn.set(element, result);
  if (!onZoom) return;
  let range = null;
  result.view.addSignalListener("zoom", (_, selected) => { range = selected.x || null; });
  element.querySelector("canvas").addEventListener("pointerup", () => {
    setTimeout(() => { if (range && range[1] > range[0]) onZoom(range[0], range[1]); });
  });
}
