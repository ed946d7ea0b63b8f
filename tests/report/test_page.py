"""The page as a browser shows it: without a network, from disk."""

import html
import json
import re
import shutil
import subprocess

import pytest
from result_folders import fail, sweep

from bnnft.report.__main__ import main

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium here (Debian: apt-get install chromium)")

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


def test_all_figures_are_drawn_and_nothing_is_complained_of(seen):
    assert all(count > 0 for count in seen["figures"])
    assert seen["problems"] == []


def test_curves_are_those_of_the_groups(seen, folder):
    from bnnft.report.groups import pooled
    from bnnft.runs.results import read_result

    assert seen["groups"] == ["0.0", "0.05", "0.1", "0.2"]
    results = [read_result(path) for path in sorted(folder.glob("ber.rate=0.1,*"))]
    assert seen["curve"] == pytest.approx([100 * mean for mean in pooled(results)[1]])


def test_a_reader_groups_sorts_and_filters(seen):
    assert seen["seeds"] == ["0", "1", "2"]
    assert seen["neurons"] == [["fc1", [0, 0.05, 0.1, 0.2]]]
    assert [name.split(",")[0] for name in seen["ascending"][1:4]] == ["ber.rate=0.2"] * 3  # the failed one has none
    assert [name.split(",")[0] for name in seen["descending"][:3]] == ["ber.rate=0.0"] * 3
    assert len(seen["filtered"]) == 4


def test_what_failed_is_said_as_text(seen):
    assert "failed ValueError: <b>bold</b></script>" in seen["missing"]


def test_it_fits_a_phone(folder):
    assert not shown(folder, width=500)["overflow"]


def test_it_needs_no_network(folder):
    """All addresses that anything would be loaded from are in the page itself."""
    page = (folder / "report.html").read_text()
    markup = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"(src|href)=|url\(|@import", markup)
