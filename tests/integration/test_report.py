"""The report of a real run and a real evaluation, looked at in a real browser."""

import html
import json
import re
import shutil
import subprocess

import pytest

from supmer_ray.errors import UserError
from supmer_ray.report import report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)

DRAWN = {
    "1-losses": "query loss",
    "1-signals": "z, gate",
    "1-alignment": "cos(query gradient, ψ)",
    "1-domains": "first two principal axes",
    "2-differences": "points above prompt-tuning",
    "2-accuracies": "test accuracy, per cent",
    "2-domain-gaps": "test accuracy, per cent",
    "3-differences": "points above prompt-tuning",
    "3-curves": "shots",
    "3-accuracies": "test accuracy, per cent",
    "3-domain-gaps": "out of domain",
}
"""Every figure, and words that stand in it."""

PROBE = """<!doctype html><meta charset="utf-8">
<iframe width="%d" height="3000" srcdoc="%s"></iframe><pre id="seen"></pre><script>
const frame = document.querySelector('iframe');
frame.onload = () => {
  const page = frame.contentDocument, style = element => frame.contentWindow.getComputedStyle(element);
  const marks = svg => [...svg.querySelectorAll('path, use, circle')].filter(mark => {
    const box = mark.getBoundingClientRect();
    return box.width + box.height > 0 && [style(mark).stroke, style(mark).fill].some(colour => /rgb/.test(colour));
  });
  document.querySelector('#seen').textContent = JSON.stringify({
    needs: page.documentElement.scrollWidth, has: page.documentElement.clientWidth,
    fetched: frame.contentWindow.performance.getEntriesByType('resource').length,
    paper: style(page.body).backgroundColor,
    headings: [...page.querySelectorAll('h2')].map(heading => heading.textContent),
    rows: page.querySelectorAll('tbody tr').length,
    figures: [...page.querySelectorAll('figure')].map(figure => {
      const svg = figure.querySelector('svg'), box = svg.getBoundingClientRect();
      const texts = [...svg.querySelectorAll('text')];
      return {
        name: figure.id, width: box.width, height: box.height, marks: marks(svg).length,
        colours: new Set(marks(svg).flatMap(mark => [style(mark).stroke, style(mark).fill])).size,
        texts: texts.map(text => text.textContent).join(' | '), ink: style(texts[0]).fill,
        smallest: Math.min(...texts.map(text => text.getBoundingClientRect().height)),
      };
    }),
  });
};
</script>"""


@pytest.fixture(scope="module")
def page(compared, along_shots, tmp_path_factory):
    out, shots = compared[0], along_shots[0]
    return report([out / "runs" / "supmer", out, shots], tmp_path_factory.mktemp("report") / "page")


def seen(page, folder, *, width, dark):
    """What a browser has drawn of the page in a frame of this width."""
    probe = folder / "probe.html"
    probe.write_text(PROBE % (width, html.escape(page.read_text(encoding="utf-8"), quote=True)), encoding="utf-8")
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1400,3200",
        f"--user-data-dir={folder / 'profile'}", f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        "--virtual-time-budget=20000", "--dump-dom", probe.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="seen">(\{.*\})</pre>', done.stdout, flags=re.DOTALL)
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


def luminance(colour):
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
        for part in (int(number) / 255 for number in re.findall(r"\d+", colour)[:3])
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.skipif(BROWSER is None, reason="no browser here: install chromium (apt-get install chromium)")
@pytest.mark.parametrize(("width", "dark"), [(360, True), (1200, False)])
def test_a_browser_draws_every_figure(page, tmp_path, width, dark):
    found = seen(page, tmp_path, width=width, dark=dark)
    assert found["needs"] <= found["has"] <= width, "the page is wider than the screen"
    assert found["fetched"] == 0
    assert found["headings"] == ["Run supmer", "Evaluation out", "Evaluation shots"] and found["rows"] > 20
    assert [figure["name"] for figure in found["figures"]] == list(DRAWN)
    paper = luminance(found["paper"])
    assert (paper < 0.1) == dark
    for figure in found["figures"]:
        assert DRAWN[figure["name"]] in figure["texts"], figure
        assert figure["marks"] > 5 and figure["colours"] > 2, figure
        assert 200 < figure["width"] <= width and figure["height"] > 80, figure
        assert figure["smallest"] > 8, "too small to read"
        bright, dim = sorted((luminance(figure["ink"]), paper), reverse=True)
        assert (bright + 0.05) / (dim + 0.05) > 7, "text and background are too alike"


def test_the_page_asks_for_nothing_and_its_figures_stand_beside_it(page):
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)=["'](?!#)|@import|url\((?!#)|https?://""", text)
    assert text.count("<svg ") == len(DRAWN)
    identities = re.findall(r'\bid="([^"]+)"', text)
    assert len(identities) == len(set(identities)), "two figures share a name for a part"
    assert set(re.findall(r'(?:url\(|href=")#([^")]+)', text)) <= set(identities)
    for name in DRAWN:
        assert (page.parent / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "</svg>" in (page.parent / "figures" / f"{name}.svg").read_text(encoding="utf-8")


def test_what_cannot_be_reported_is_refused(compared, page, tmp_path):
    out, *_ = compared
    with pytest.raises(UserError, match=r"is neither a run .* nor an evaluation"):
        report([tmp_path], tmp_path / "out")
    with pytest.raises(UserError, match=r"already holds a run; choose another, or add --overwrite"):
        report([out], page.parent)
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    shutil.copy(out / "evaluation.json", unfinished)
    with pytest.raises(UserError, match=r"has no results.parquet yet; finish it with 'supmer evaluate --resume'"):
        report([unfinished], tmp_path / "out")
    begun = tmp_path / "begun"
    begun.mkdir()
    shutil.copy(out / "runs" / "supmer" / "run.json", begun)
    (begun / "metrics.jsonl").write_text('{"kind": "validation", "step": 0, "validation": {}}\n{"kind": "st')
    with pytest.raises(UserError, match=r"has no step to show yet"):
        report([begun], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_domains_of_another_store_are_not_drawn_as_the_runs(compared, tmp_path):
    shutil.copytree(compared[0] / "runs" / "supmer", run := tmp_path / "run")
    settings = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**settings, "store_digest": "of the day before"}))
    text = report([run], tmp_path / "page").read_text(encoding="utf-8")
    assert re.search(r"The domains are not drawn\. The store .* was made anew since the run was started\.", text)
