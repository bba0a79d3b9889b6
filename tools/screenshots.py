"""Make the pictures in docs/images/ from what `make demo` has left; needs Chromium.

The report is the demo's own. The audit is of new synthetic bins, of which every tenth record is
made wrong. So no real photograph is shown.
"""

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageOps

from tools.demo import CLONE, ROOT
from tools.synthetic import synthetic_bins

IMAGES = ROOT / "docs/images"
BROWSERS = ("chromium", "google-chrome")
# Narrow, since README shows the two pictures side by side; in sharper pixels than the page's own.
WIDTH, HEIGHT, SCALE = 840, 930, 1.5
FRAME = 2
COLORS = 128
AUDITED_BINS = 150
WRONG_EVERY = 10
QUANTITIES = range(1, 6)
MODELS = ("resnet34", "vit")


def main() -> None:
    argparse.ArgumentParser(prog="python -m tools.screenshots", description=__doc__).parse_args()
    if not (CLONE / "reports/index.html").exists():
        sys.exit("screenshots: error: there is no report of the demo: run `make demo` first")
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit("screenshots: error: Chromium is not installed: run `apt install chromium`")
    for path in take_pictures(browser, CLONE, IMAGES):
        print(f"screenshots: {path.relative_to(ROOT)}, {path.stat().st_size / 1000:.0f} kB")


def take_pictures(browser: str, project: Path, images: Path) -> list[Path]:
    """Pictures of the project's report and of an audit by its two models, as PNG files."""
    images.mkdir(parents=True, exist_ok=True)
    report, audit = images / "report.png", images / "audit.png"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_png(report, screenshot(browser, project / "reports/index.html", folder))
        write_bins(folder / "bins")
        page = audit_page([project / "models" / name for name in MODELS], folder)
        write_png(audit, screenshot(browser, page, folder))
    return [report, audit]


def write_bins(folder: Path) -> None:
    """Photographs and records as in Amazon's bucket; every tenth record has a wrong count."""
    for name in ("bin-images", "metadata"):
        (folder / name).mkdir(parents=True)
    bins = [one for one in synthetic_bins(AUDITED_BINS, seed=1) if one.quantity in QUANTITIES]
    for number, one in enumerate(bins):
        record = json.loads(one.record)
        if number % WRONG_EVERY == 0:
            record["EXPECTED_QUANTITY"] = (one.quantity + 1) % len(QUANTITIES) + 1
        (folder / f"bin-images/{one.id}.jpg").write_bytes(one.photograph)
        (folder / f"metadata/{one.id}.json").write_text(json.dumps(record), "utf-8")


def audit_page(models: Sequence[Path], folder: Path) -> Path:
    """The page of an audit of the bins in `folder`."""
    command = [sys.executable, "-m", "tools.audit", "bins", "--false-alarm", "0.01"]
    for model in models:
        command += ["--model", str(model.absolute())]
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    if done.returncode not in (0, 1):
        sys.exit("screenshots: error: the audit failed; it says why above")
    return folder / "audit/index.html"


def screenshot(browser: str, page: Path, folder: Path) -> bytes:
    """The top of a page, as a PNG file. The browser keeps its profile in `folder`."""
    target = folder / "page.png"
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={folder / 'profile'}", f"--window-size={WIDTH},{HEIGHT}"]
    command += [f"--force-device-scale-factor={SCALE}", f"--screenshot={target}"]
    subprocess.run([*command, page.as_uri()], check=True, stderr=subprocess.DEVNULL)
    return target.read_bytes()


def write_png(path: Path, screenshot: bytes) -> None:
    """Write it in a frame, since pages are white, and in few colors, so that it is small."""
    with Image.open(io.BytesIO(screenshot)) as image:
        framed = ImageOps.expand(image.convert("RGB"), FRAME, "#d0d7de")
        framed.quantize(COLORS).save(path, optimize=True)


if __name__ == "__main__":
    main()
