"""Style and script of the page of a task: constants without any data in them.

That is what lets the page's content security policy name both by their digest: whatever a model wrote into a task, the
browser runs nothing and styles nothing but these two texts.
"""

from __future__ import annotations

from base64 import b64encode
from hashlib import sha256
from typing import Final

STYLE: Final = """
:root { color-scheme: light dark; --paper: #fbfbfa; --card: #fff; --ink: #1d2129; --soft: #667080; --line: #e3e5e9;
  --hover: #eef3fa; --accent: #b3261e; --ok: #1f7a4d; --warn: #9a6700; --planning: #8a78d6; --queueing: #c3c9d2;
  --loading: #e6b450; --backoff: #d9c7a0; --waiting: #e3e5e9; --inference: #3d7fc9; --gates: #35a08b; --retry: #e07a5f;
  --checks: #7f9f3f; --slack: #a9b1bd; --edge: #8d97a5; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171c; --card: #1b1f26; --ink: #e6e8ec; --soft: #98a2b1;
  --line: #2d333d; --hover: #232a35; --accent: #ff8a7a; --ok: #6cc79a; --warn: #e3b341; --planning: #9f90e6;
  --queueing: #4b5462; --loading: #c79a3e; --backoff: #7d6f4e; --waiting: #333a45; --inference: #5a9be0;
  --gates: #45b49f; --retry: #d9735a; --checks: #98b955; --slack: #5d6775; --edge: #6d7787; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 14px/1.5 system-ui, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 28px 24px 60px; }
h1 { font-size: 22px; line-height: 1.3; margin: 4px 0 6px; overflow-wrap: anywhere; font-weight: 650; }
h2 { font-size: 15px; margin: 34px 0 10px; font-weight: 650; }
p { margin: 4px 0; overflow-wrap: anywhere; }
code, pre, .id { font-family: ui-monospace, monospace; font-size: 12.5px; }
.soft { color: var(--soft); }
.chip { display: inline-block; padding: 0 9px; border-radius: 10px; border: 1px solid currentColor; font-size: 12px;
  line-height: 19px; white-space: nowrap; }
.good { color: var(--ok); } .bad { color: var(--accent); } .doubt { color: var(--warn); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 12px; margin: 22px 0 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px 14px; }
.card b { display: block; font-size: 20px; font-weight: 620; }
.card span { color: var(--soft); font-size: 12.5px; }
.paths { display: grid; grid-template-columns: max-content 1fr; gap: 8px 16px; align-items: baseline; }
.paths .steps { overflow-wrap: anywhere; }
.paths .step { display: inline-block; padding: 0 7px; border-radius: 5px; background: var(--card); line-height: 21px;
  border: 1px solid var(--line); font-size: 12.5px; margin: 1px 0; }
.paths .step.both { border-color: var(--accent); color: var(--accent); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 0 0 10px; color: var(--soft); font-size: 12.5px; }
.legend svg { vertical-align: -1px; margin-right: 6px; }
.frame { background: var(--card); border: 1px solid var(--line); border-radius: 8px; overflow-x: auto; }
.chart { display: grid; grid-template-columns: 210px minmax(560px, 1fr); padding: 6px 18px 12px 0; }
.chart svg { display: block; width: 100%; overflow: visible; }
.labels { padding: 28px 12px 0 14px; margin: 0; list-style: none; }
.labels li { height: 24px; line-height: 24px; white-space: nowrap; overflow: hidden; text-overflow: ellipsis;
  font-size: 12.5px; color: var(--soft); }
.labels b { color: var(--ink); font-weight: 600; margin-right: 6px; }
.labels .critical b { color: var(--accent); }
.dense .labels li { height: 18px; line-height: 18px; font-size: 11.5px; }
.packed .labels li { height: 12px; line-height: 12px; font-size: 9.5px; }
.tick { stroke: var(--line); } .ticks text { fill: var(--soft); font-size: 11px; }
.back { fill: transparent; } .row:hover .back { fill: var(--hover); }
.planning { fill: var(--planning); } .queueing { fill: var(--queueing); } .loading { fill: var(--loading); }
.backoff { fill: var(--backoff); } .waiting { fill: var(--waiting); } .inference { fill: var(--inference); }
.gates { fill: var(--gates); } .retry { fill: var(--retry); } .checks { fill: var(--checks); }
.slack { stroke: var(--slack); stroke-width: 2; stroke-dasharray: 2 3; }
.mark { fill: var(--accent); }
.within { fill: #fff; font-size: 11px; font-weight: 600; pointer-events: none; }
.within.idle { fill: var(--ink); font-weight: 400; }
.row.aside rect:not(.back) { opacity: .68; }
.edge { stroke: var(--edge); stroke-width: 1; opacity: .4; pointer-events: none; }
.edge circle { fill: var(--edge); stroke: none; }
.edge.critical { stroke: var(--accent); opacity: .85; } .edge.critical circle { fill: var(--accent); }
.many .edge:not(.critical) { display: none; }
.hovering .edge { opacity: .08; }
.hovering .edge.lit { display: inline; opacity: 1; stroke-width: 1.5; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; background: var(--card); }
table { border-collapse: collapse; width: 100%; font-size: 12.5px; }
th { text-align: left; font-weight: 600; color: var(--soft); }
th, td { padding: 6px 10px; border-top: 1px solid var(--line); vertical-align: top; }
thead th { border-top: 0; white-space: nowrap; }
td.number, th.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
td.wide { min-width: 240px; overflow-wrap: anywhere; }
td.who { white-space: nowrap; }
td p { margin: 0; }
details { border: 1px solid var(--line); border-radius: 8px; background: var(--card); margin: 8px 0;
  padding: 8px 14px; }
summary { cursor: pointer; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 10px 0 4px; max-height: 480px; overflow-y: auto; }
@media (max-width: 640px) { main { padding: 18px 12px; } .chart { grid-template-columns: 120px minmax(420px, 1fr); } }
@media print { body { background: #fff; } .frame, .scroll { overflow: visible; } }
"""

SCRIPT: Final = """
(function () {
  var chart = document.querySelector(".chart");
  if (!chart) { return; }
  var edges = Array.prototype.slice.call(chart.querySelectorAll(".edge"));
  function show(row) {
    chart.classList.toggle("hovering", row !== null);
    edges.forEach(function (edge) {
      edge.classList.toggle("lit", row !== null && (edge.dataset.from === row || edge.dataset.to === row));
    });
  }
  Array.prototype.forEach.call(chart.querySelectorAll("[data-row]"), function (row) {
    row.addEventListener("mouseenter", function () { show(row.dataset.row); });
    row.addEventListener("mouseleave", function () { show(null); });
  });
}());
"""


def policy() -> str:
    """The content security policy of a page that holds STYLE and SCRIPT and loads nothing."""
    style, script = (b64encode(sha256(text.encode()).digest()).decode() for text in (STYLE, SCRIPT))
    return (
        f"default-src 'none'; style-src 'sha256-{style}'; script-src 'sha256-{script}'; base-uri 'none'; "
        "form-action 'none'"
    )
