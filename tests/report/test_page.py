"""The page as a browser shows it: without a network, from disk."""

import html
import importlib.resources
import json
import math
import re
import shutil
import subprocess

import pytest
from result_folders import begin, fail, finish_with, sweep

from bnnft import BERCurve
from bnnft.report.__main__ import main
from bnnft.report.page import page_data
from bnnft.runs.job import read_jobs

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
with_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium here (Debian: apt-get install chromium)")

# what a reader does, once the page is there; what it says goes into an element that the test reads
LISTEN = """<script>
const problems = [];
window.addEventListener("error", event => problems.push(String(event.message)));
for (const kind of ["error", "warn"]) console[kind] = (...said) => problems.push(said.join(" "));
</script>"""
DO = """<script>
const first = () => [...document.querySelectorAll("#runs tbody tr")].map(row => row.cells[0].textContent);
const traces = id => document.getElementById(id).data;
const choose = (id, value) => {
  const select = document.getElementById(id);
  select.value = value;
  select.dispatchEvent(new Event("change"));
};
const seen = {};
const figures = ["curves", "neurons", "tolerance", "pareto"];
seen.figures = figures.map(id => document.querySelectorAll(`#${id} svg.main-svg`).length);
seen.groups = traces("curves").filter(trace => trace.name).map(trace => trace.name);
seen.curve = traces("curves").filter(trace => trace.name)[2].y;
choose("group", "seed");
seen.seeds = traces("curves").filter(trace => trace.name).map(trace => trace.name);
choose("metric", "importance_cv");
seen.neurons = traces("neurons").map(trace => [trace.name, trace.x]);
const head = [...document.querySelectorAll("#runs th")].find(cell => cell.textContent === "clean (%)");
head.click();
seen.ascending = first();
head.click();
seen.descending = first();
const filter = document.getElementById("filter");
filter.value = "seed=1";
filter.dispatchEvent(new Event("input"));
seen.filtered = first();
seen.missing = document.getElementById("missing").textContent;
seen.overflow = document.documentElement.scrollWidth > window.innerWidth;
seen.problems = problems;
const out = document.createElement("pre");
out.id = "seen";
out.textContent = JSON.stringify(seen);
document.body.append(out);
</script>"""


# as much of a browser as the script of the page needs
DOCUMENT = """
class Node {
  constructor() { this.listeners = []; this.children = []; this.cells = []; this.textContent = ""; this.value = ""; }
  addEventListener(kind, listener) { this.listeners.push(listener); }
  replaceChildren(...children) {
    this.children = children;
    for (const child of children) if (child.chosen) this.value = child.value;
  }
  append(...children) { this.children.push(...children); this.cells.push(...children); }
  insertCell() { const cell = new Node(); this.cells.push(cell); return cell; }
  insertRow() { const row = new Node(); this.row = row; return row; }
  removeAttribute() {}
  setAttribute() {}
  get tHead() { return this.head ??= new Node(); }
  get tBodies() { return this.bodies ??= [new Node()]; }
}
const nodes = { data: Object.assign(new Node(), { textContent: JSON.stringify(given) }) };
const drawn = {};
globalThis.document = { getElementById: id => nodes[id] ??= new Node(), createElement: () => new Node() };
globalThis.getComputedStyle = () => ({ getPropertyValue: () => "#000" });
globalThis.matchMedia = () => new Node();
globalThis.Option = class { constructor(text, value, chosen) { Object.assign(this, { text, value, chosen }); } };
globalThis.Plotly = { react: (id, traces, shape) => { drawn[id] = { traces, shape }; } };
"""
CHOOSE = """
const look = () => {
  const trace = drawn.curves.traces.filter(each => each.name).at(-1);
  return { x: trace.x, y: trace.y, title: nodes["curves-title"].textContent, axis: drawn.curves.shape.yaxis.title.text,
    head: nodes.runs.tHead.row.cells.map(cell => cell.textContent),
    row: nodes.runs.tBodies[0].children.at(-1).cells.map(cell => cell.textContent) };
};
const seen = [look()];
nodes.curve.value = "mine";
nodes.curve.listeners.forEach(listener => listener());
seen.push(look());
console.log(JSON.stringify(seen));
"""


def shown(folder, width=1200):
    """Open the page and do what a reader does; returns what was seen."""
    page = (folder / "report.html").read_text()
    page = page.replace("<head>", f"<head>{LISTEN}", 1)
    cut = page.rindex("</body>")
    (folder / "tried.html").write_text(page[:cut] + DO + page[cut:])
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900", "--virtual-time-budget=5000"]
    profile = f"--user-data-dir={folder / 'profile'}"
    command = [BROWSER, *flags, profile, "--dump-dom", (folder / "tried.html").as_uri()]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    return json.loads(html.unescape(re.search(r'<pre id="seen">(.*?)</pre>', text, re.DOTALL)[1]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = sweep(tmp_path_factory.mktemp("page"))
    fail(folder, 0.3, 0, ValueError("<b>bold</b></script>"))
    assert main([str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def seen(folder):
    return shown(folder)


@with_browser
def test_all_figures_are_drawn_and_nothing_is_complained_of(seen):
    assert all(count > 0 for count in seen["figures"])
    assert seen["problems"] == []


@with_browser
def test_curves_are_those_of_the_groups(seen, folder):
    from bnnft.report.groups import pooled
    from bnnft.runs.results import read_result

    assert seen["groups"] == ["0.0", "0.05", "0.1", "0.2"]
    results = [read_result(path) for path in sorted(folder.glob("ber.rate=0.1,*"))]
    assert seen["curve"] == pytest.approx([100 * mean for mean in pooled(results)[1]])


@with_browser
def test_a_reader_groups_sorts_and_filters(seen):
    assert seen["seeds"] == ["0", "1", "2"]
    assert seen["neurons"] == [["fc1", [0, 0.05, 0.1, 0.2]]]
    assert [name.split(",")[0] for name in seen["ascending"][1:4]] == ["ber.rate=0.2"] * 3  # the failed one has none
    assert [name.split(",")[0] for name in seen["descending"][:3]] == ["ber.rate=0.0"] * 3
    assert len(seen["filtered"]) == 4


@with_browser
def test_what_failed_is_said_as_text(seen):
    assert "failed ValueError: <b>bold</b></script>" in seen["missing"]


@with_browser
def test_it_fits_a_phone(folder):
    assert not shown(folder, width=500)["overflow"]


def test_it_needs_no_network(folder):
    """All addresses that anything would be loaded from are in the page itself."""
    page = (folder / "report.html").read_text()
    markup = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"(src|href)=|url\(|@import", markup)


def test_the_page_knows_all_curves_and_leaves_out_what_is_no_number(tmp_path):
    begin(tmp_path, 0.0, 0)
    usual = BERCurve((0, 0.1), [[0.9, 0.9], [math.nan, 0.8]], 0.9)
    loss = BERCurve((1, 2), [[2.0], [3.0]], math.inf, "scale", "loss", False, (0, math.inf), name="mine")
    measured = {
        "test/tolerable_ber": 0.1,
        "test/tolerable_ber_is_lower_bound": 1.0,
        "test/mine_tolerable_scale": math.nan,
    }
    finish_with(tmp_path, 0.1, 1, [usual, loss], measured)
    jobs, _ = read_jobs([tmp_path])
    data = page_data(jobs, ["a fault"], "run", ["", ""])
    json.dumps(data, allow_nan=False)
    assert (data["key"], data["axis"], data["rates"], data["at"]) == (
        "",
        "bit error rate (%)",
        [0, 0.1],
        ["0 %", "10 %"],
    )
    (further,) = data["further"]
    assert (further["key"], further["axis"], further["percent"], further["lower_is_better"]) == (
        "mine",
        "scale",
        False,
        True,
    )
    assert (further["score_title"], further["bounds"]) == ("loss, lower is better", [0, None])
    assert data["jobs"][0]["curves"] == {}
    first, second = data["jobs"][1]["curves"][""], data["jobs"][1]["curves"]["mine"]
    assert first == {
        "clean": 0.9,
        "tolerable": 0.1,
        "bound": "≥",
        "rates": (0.0, 0.1),
        "values": [[0.9, 0.9], [None, 0.8]],
    }
    assert (second["clean"], second["tolerable"], second["values"]) == (None, None, [[2.0], [3.0]])
    assert data["faults"] == ["a fault"]


@pytest.mark.skipif(shutil.which("node") is None, reason="no node here (Debian: apt-get install nodejs)")
def test_a_reader_chooses_among_several_curves(tmp_path):
    """The script of the page, on a document that only remembers: figures and table are of the chosen curve."""
    for seed in (0, 1):
        usual = BERCurve((0, 0.1), [[0.9, 0.9], [0.7, 0.8]], 0.9)
        loss = BERCurve((1, 2), [[2.0], [3.0 + seed]], 1.5, "scale", "loss", False, name="mine")
        finish_with(tmp_path, 0.1, seed, [usual, loss], {"test/tolerable_ber": 0.05, "test/margin/fc1": 3.0})
    begin(tmp_path, 0.0, 0)
    jobs, _ = read_jobs([tmp_path])
    data = page_data(jobs, [], "seed", ["", "0", "1"])
    script = (importlib.resources.files("bnnft.report") / "page.js").read_text()
    (tmp_path / "page.js").write_text(f"const given = {json.dumps(data)};\n{DOCUMENT}\n{script}\n{CHOOSE}")
    said = subprocess.run(["node", str(tmp_path / "page.js")], capture_output=True, text=True, check=True).stdout
    first, second = json.loads(said)
    assert (first["x"], first["y"]) == ([0, 10], [90, 75])
    assert first["title"] == "Accuracy over bit errors"
    assert first["row"][-5:] == ["90.0", "90.0", "75.0", "5.0", "1"]
    assert (second["x"], second["y"]) == ([1, 2], [2, 4])
    assert second["title"] == "Loss over bit errors"
    assert second["axis"] == "loss, lower is better"
    assert "at 2" in second["head"]
