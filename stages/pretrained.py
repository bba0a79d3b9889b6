"""Keep the pretrained weights beside the data: models/pretrained/<model>."""

from pathlib import Path

from stages.core.command import run_stage
from stages.core.files import digest, publish_folder, unfinished
from stages.core.networks import download_pretrained, mark_random_start
from stages.core.params import load_params

OUT = Path("models/pretrained")


def main(model: str) -> str:
    knobs = load_params().model(model)
    key = digest(knobs.library, knobs.name, knobs.revision, knobs.pretrained)
    with unfinished(f"pretrained-{model}", key) as folder:
        if knobs.pretrained:
            summary = f"weights from {download_pretrained(knobs, folder)}"
        else:
            mark_random_start(folder)
            summary = "none: a random start"
        publish_folder(folder, OUT / model)
    return summary


if __name__ == "__main__":
    run_stage("pretrained", main, model="a key of params.yaml's train block")
