"""Run the whole pipeline on synthetic bins, in a clone of this repository, with a local S3 server.

The clone and the server stay up so that you can experiment; `make demo-clean` removes both.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import obstore
from obstore.store import S3Store
from tqdm import tqdm

from tools import plots_page
from tools.s3 import CLIENT_ENVIRONMENT, free_port, start_server, stop_server
from tools.synthetic import SyntheticBin, synthetic_bins

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "demo"
CLONE = DEMO / "warehouse-classifier"
BUCKETS = DEMO / "s3"
LOG = DEMO / "s3.log"
PID = DEMO / "s3.pid"

SYNTHETIC_BINS = 2200
TRUNCATED_PHOTOGRAPH, GARBLED_RECORD = "00004", "00005"
# Small photographs and a small ViT from random starts: minutes on two cores, without a hub.
OVERRIDES = [
    "bucket.url=s3://bins",
    "subset.bins=1400",
    "resize.size=64",
    "split.train=1080",
    "split.validation=120",
    "split.test=200",
    "train.resnet34.pretrained=false",
    "train.resnet34.batch_size=32",
    "train.resnet34.epochs=5",
    "train.resnet34.schedule=linear",
    "train.vit.pretrained=false",
    "+train.vit.config.hidden_size=96",
    "+train.vit.config.intermediate_size=192",
    "+train.vit.config.num_hidden_layers=4",
    "+train.vit.config.num_attention_heads=4",
    "+train.vit.config.patch_size=8",
    "train.vit.learning_rate=5e-4",
    "train.vit.warmup_steps=50",
    "train.vit.batch_size=32",
    "train.vit.epochs=14",
]


def main() -> None:
    argparse.ArgumentParser(prog="python -m tools.demo", description=__doc__).parse_args()
    clean()
    started = time.monotonic()
    os.environ |= CLIENT_ENVIRONMENT
    endpoint = serve_buckets()
    try:
        fill_bucket(endpoint)
        make_clone(endpoint)
        run_pipeline(endpoint)
    except BaseException as error:
        stop_server(PID)
        if isinstance(error, subprocess.CalledProcessError):
            sys.exit(f"demo: error: `{' '.join(error.cmd)}` failed; its output is above")
        raise
    show(endpoint, time.monotonic() - started)


def clean() -> None:
    """Stop the server and remove all that an earlier demo left."""
    stop_server(PID)
    if DEMO.exists():
        print(f"removing the previous demo, {DEMO.relative_to(ROOT)}/")
        shutil.rmtree(DEMO)


def serve_buckets() -> str:
    """Start an S3 server with two empty buckets, and return its URL."""
    for bucket in ("bins", "storage"):
        (BUCKETS / bucket).mkdir(parents=True)
    return start_server(BUCKETS, free_port(), LOG, PID)


def fill_bucket(endpoint: str) -> None:
    """Render the bins and upload them; one photograph and one record are broken."""
    bucket = S3Store(
        "bins", endpoint=endpoint, skip_signature=True, client_options={"allow_http": True}
    )

    def put(synthetic: SyntheticBin) -> None:
        photograph, record = synthetic.photograph, synthetic.record
        if synthetic.id == TRUNCATED_PHOTOGRAPH:
            photograph = photograph[: len(photograph) // 2]
        if synthetic.id == GARBLED_RECORD:
            record = b"not a record"
        obstore.put(bucket, f"bin-images/{synthetic.id}.jpg", photograph)
        obstore.put(bucket, f"metadata/{synthetic.id}.json", record)

    print(f"rendering {SYNTHETIC_BINS} synthetic bins into the bucket s3://bins at {endpoint}")
    bins = tqdm(
        synthetic_bins(SYNTHETIC_BINS, seed=0), total=SYNTHETIC_BINS, unit=" bins", disable=None
    )
    with ThreadPoolExecutor(16) as pool:
        for uploaded in [pool.submit(put, synthetic) for synthetic in bins]:
            uploaded.result()


def make_clone(endpoint: str) -> None:
    """A clone of this repository's HEAD, whose DVC remote is the second bucket."""
    print(f"cloning this repository (its last commit) to {CLONE.relative_to(ROOT)}")
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(CLONE)], check=True)
    # A fresh machine's git has no identity, and experiments are commits.
    in_clone("git", "config", "user.name", "Demo")
    in_clone("git", "config", "user.email", "demo@localhost")
    in_clone("git", "config", "commit.gpgsign", "false")
    for key, value in {
        "url": "s3://storage",
        "endpointurl": endpoint,
        "access_key_id": "demo",
        "secret_access_key": "demo",
    }.items():
        in_clone("dvc", "remote", "modify", "--quiet", "--local", "storage", key, value)
    plots_page.install(CLONE)


def run_pipeline(endpoint: str) -> None:
    """Run the experiment, commit it, so that later ones can be compared with it, and push."""
    overrides = [*OVERRIDES, f"bucket.endpoint={endpoint}"]
    settings = [word for override in overrides for word in ("--set-param", override)]
    # Quiet, since DVC warns of every output that doesn't exist yet; the stages still report.
    in_clone("dvc", "exp", "run", "--quiet", "--name", "demo", *settings)
    in_clone("git", "add", ".")
    in_clone("git", "commit", "--quiet", "--message", "The demo's run")
    in_clone("dvc", "push")


def show(endpoint: str, seconds: float) -> None:
    print()
    in_clone("dvc", "metrics", "show")
    print()
    print(f"Done in {seconds / 60:.1f} minutes. {farewell(endpoint)}")


def farewell(endpoint: str) -> str:
    """What is there now, and three things to try."""
    clone = CLONE.relative_to(ROOT)
    settings = " ".join(f"{name}={value}" for name, value in CLIENT_ENVIRONMENT.items())
    return f"""\
Open the report in a browser: {clone}/reports/index.html

The clone and its S3 server stay up so you can experiment. In a shell, first:

  . .venv/bin/activate && cd {clone}
  export {settings}

1. Change one setting. Only the stages that depend on it run again: train@vit, evaluate@vit,
   ensemble, witness and report. The second command draws both runs into dvc_plots/index.html.

  dvc exp run -S train.vit.learning_rate=1e-3
  dvc plots diff HEAD workspace

2. Look for wrong records. audit/index.html then shows the bins whose photograph contradicts the
   record. Every record here is correct, so every alarm is false; about 5% are expected.

  python -m tools.audit s3://bins --endpoint {endpoint}

3. Be the colleague who has no GPU. The first two commands share your work and delete it here; the
   last one fetches a trained model within seconds.

  dvc push
  rm -rf .dvc/cache models/vit
  dvc pull models/vit

`make demo-clean` stops the server and removes everything."""


def in_clone(*command: str) -> None:
    """Run a command in the clone, with this environment's programs and no AWS settings."""
    programs = str(Path(sys.executable).parent)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("AWS_")}
    environment |= CLIENT_ENVIRONMENT
    environment["PATH"] = os.pathsep.join([programs, environment["PATH"]])
    sys.stdout.flush()
    subprocess.run(command, cwd=CLONE, env=environment, check=True)


if __name__ == "__main__":
    main()
