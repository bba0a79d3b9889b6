"""Keep the pretrained weights beside the data: models/pretrained/<model>."""

from stages.networks.model_files import SOURCE, read_json_object
from stages.networks.pretrained import mark_random_start, obtain_pretrained
from stages.runtime import paths
from stages.runtime.command import run_stage
from stages.runtime.files import digest
from stages.runtime.params import load_params
from stages.runtime.work import publish_folder, resumable


def main(model: str) -> str:
    params = load_params().model(model)
    key = digest(params.library, params.name, params.revision, params.pretrained)
    with resumable(f"pretrained-{model}", key) as folder:
        # This file is written last, so the weights are there if it is.
        if not (folder / SOURCE).exists():
            if params.pretrained:
                obtain_pretrained(params, folder)
            else:
                mark_random_start(folder)
        source = read_json_object(folder / SOURCE)
        publish_folder(folder, paths.PRETRAINED / model)
    return (
        f"weights from {source['source']}"
        if params.pretrained
        else "no pretrained weights; training starts from random ones"
    )


if __name__ == "__main__":
    run_stage("pretrained", main, model="a key of params.yaml's train block")
