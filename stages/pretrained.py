"""Keep the pretrained weights beside the data: models/pretrained/<model>."""

import json
from pathlib import Path

from stages.core.command import run_stage
from stages.core.files import digest
from stages.core.model_files import SOURCE
from stages.core.networks import download_pretrained, mark_random_start
from stages.core.params import load_params
from stages.core.work import publish_folder, unfinished

OUT = Path("models/pretrained")


def main(model: str) -> str:
    knobs = load_params().model(model)
    key = digest(knobs.library, knobs.name, knobs.revision, knobs.pretrained)
    with unfinished(f"pretrained-{model}", key) as folder:
        # It comes last; a run that was killed after it has the weights.
        if not (folder / SOURCE).exists():
            if knobs.pretrained:
                download_pretrained(knobs, folder)
            else:
                mark_random_start(folder)
        source = json.loads((folder / SOURCE).read_text("utf-8"))
        publish_folder(folder, OUT / model)
    return f"weights from {source['source']}" if knobs.pretrained else "none: a random start"


if __name__ == "__main__":
    run_stage("pretrained", main, model="a key of params.yaml's train block")
