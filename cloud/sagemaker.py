"""Train one model in an Amazon SageMaker job, and bring it back as the train stage would make it.

It sends the stage's code and inputs to the bucket, starts the job, prints the job's log as it
comes, and puts the outcome into models/<model> and reports/<model>/curves.csv, for
`dvc commit --force train@<model>` to take. Ctrl-C leaves the job running; --attach follows it
again.
"""

import argparse
import json
import re
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import boto3
from boto3.exceptions import Boto3Error
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

from cloud.sagemaker_files import (
    CURVES,
    ENTRY,
    MODELS,
    REPORTS,
    Inputs,
    collect_inputs,
    fetch,
    one_line,
    upload,
)
from stages.runtime.errors import UserError
from stages.runtime.params import load_params

if TYPE_CHECKING:
    from mypy_boto3_logs import CloudWatchLogsClient
    from mypy_boto3_sagemaker import SageMakerClient
    from mypy_boto3_sagemaker.type_defs import DescribeTrainingJobResponseTypeDef

#: The published experiment's: one A10G, and 8 cores.
INSTANCE = "ml.g5.2xlarge"
#: AWS's image with this project's torch, and the regions where this account has it, by
#: image_uri_config/pytorch-amzn2023.json of sagemaker-core 2.27.
IMAGE = "763104351884.dkr.ecr.{region}.amazonaws.com/pytorch:2.14-cu133-amzn2023-sagemaker"
IMAGE_REGIONS = (
    "ap-northeast-1 ap-northeast-2 ap-south-1 ap-southeast-1 ap-southeast-2 ca-central-1"
    " eu-central-1 eu-north-1 eu-west-1 eu-west-2 eu-west-3 sa-east-1 us-east-1 us-east-2"
    " us-west-1 us-west-2"
)
#: For what the image lacks, the inputs, the photographs once more, and checkpoints.
VOLUME_GB = 50
#: What SageMaker finds in the lines that stages/train.py prints.
METRICS = {"epoch": r" epoch (\d+)/"} | {
    f"{name}:{metric}": pattern.format(name)
    for name in ("train", "validation", "test")
    for metric, pattern in {
        "loss": r"\b{} loss (\d+\.\d+)",
        "accuracy": r"\b{} loss \S+ accuracy (\d+\.\d+)",
    }.items()
}
LOG_GROUP = "/aws/sagemaker/TrainingJobs"
ENDED = ("Completed", "Failed", "Stopped")
#: Between two looks at a job, and from its end to its last lines, which CloudWatch delays.
POLL_SECONDS = 10


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    try:
        print(run(options))
    except UserError as error:
        sys.exit(f"sagemaker: error: {error}")
    except NoCredentialsError:
        sys.exit(
            "sagemaker: error: there are no AWS credentials: set AWS_ACCESS_KEY_ID and"
            " AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        )
    except (OSError, Boto3Error, BotoCoreError, ClientError) as error:
        sys.exit(f"sagemaker: error: {one_line(error)}")
    except KeyboardInterrupt:
        print("sagemaker: interrupted", file=sys.stderr)
        sys.exit(130)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m cloud.sagemaker", description=__doc__)
    parser.add_argument("model", help="a key of params.yaml's train block")
    parser.add_argument("--bucket", required=True, help="s3://bucket/folder, for inputs and models")
    parser.add_argument("--role", help="ARN of a role that SageMaker may assume")
    parser.add_argument("--instance-type", default=INSTANCE, help=INSTANCE)
    parser.add_argument("--image", help="of PyTorch; AWS's own, by region")
    parser.add_argument("--spot", action="store_true", help="cheaper; if killed, it goes on later")
    parser.add_argument("--hours", type=int, default=24, help="after which it is stopped: 24")
    parser.add_argument("--dry-run", action="store_true", help="print the request, send nothing")
    parser.add_argument("--attach", metavar="JOB", help="follow this job, and start none")
    options = parser.parse_args(arguments)
    if not (options.role or options.attach):
        parser.error("--role is needed: the ARN of a role that SageMaker may assume")
    return options


def run(options: argparse.Namespace) -> str:
    """What there is to say in the end."""
    model = options.model
    load_params().model(model)
    session = boto3.Session()
    if session.region_name is None:
        raise UserError("there is no AWS region: set AWS_DEFAULT_REGION")
    inputs = collect_inputs(model, options.bucket)
    job = options.attach
    if not job:
        request = training_request(options, inputs, session.region_name)
        if options.dry_run:
            return json.dumps(request, indent=2)
        upload(inputs, session.client("s3"))
        session.client("sagemaker").create_training_job(**request)
        job = request["TrainingJobName"]
    try:
        description = follow(job, session.client("sagemaker"), session.client("logs"))
        check_outcome(description, inputs)
        fetch(description["ModelArtifacts"]["S3ModelArtifacts"], model, session.client("s3"))
    except (KeyboardInterrupt, OSError, Boto3Error, BotoCoreError, ClientError):
        print(how_to_go_on(job, options), file=sys.stderr)
        raise
    return (
        f"sagemaker: {MODELS / model} and {REPORTS / model / CURVES} are what {job} made:"
        f" `dvc commit --force train@{model}`, then `dvc repro`"
    )


def training_request(options: argparse.Namespace, inputs: Inputs, region: str) -> dict[str, Any]:
    """What SageMaker's CreateTrainingJob is asked."""
    seconds = options.hours * 3600
    stopping = {"MaxRuntimeInSeconds": seconds}
    if options.spot:
        # For the job and its waits for an instance together.
        stopping["MaxWaitTimeInSeconds"] = 2 * seconds
    name = re.sub("[^a-z0-9]+", "-", options.model.lower())[:30]
    return {
        "TrainingJobName": f"bins-{name}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}",
        "RoleArn": options.role,
        "AlgorithmSpecification": {
            "TrainingImage": options.image or default_image(region),
            "TrainingInputMode": "File",
            "ContainerEntrypoint": ["python3", f"/opt/ml/input/data/code/{ENTRY.name}"],
            "ContainerArguments": [options.model],
            "MetricDefinitions": [{"Name": key, "Regex": METRICS[key]} for key in METRICS],
        },
        "InputDataConfig": [channel("code", inputs.code), channel("data", inputs.data)],
        "OutputDataConfig": {"S3OutputPath": f"{options.bucket.rstrip('/')}/jobs"},
        "ResourceConfig": {
            "InstanceType": options.instance_type,
            "InstanceCount": 1,
            "VolumeSizeInGB": VOLUME_GB,
        },
        "StoppingCondition": stopping,
        "EnableManagedSpotTraining": options.spot,
        "CheckpointConfig": {"S3Uri": inputs.checkpoints, "LocalPath": "/opt/ml/checkpoints"},
    }


def channel(name: str, url: str) -> dict[str, Any]:
    # With its slash it is a folder, and not whatever else begins so.
    source = {"S3DataType": "S3Prefix", "S3Uri": f"{url}/"}
    return {"ChannelName": name, "DataSource": {"S3DataSource": source}}


def default_image(region: str) -> str:
    if region not in IMAGE_REGIONS.split():
        raise UserError(f"where AWS keeps its images for {region} is not known here: add --image")
    return IMAGE.format(region=region)


def follow(
    job: str, sagemaker: "SageMakerClient", logs: "CloudWatchLogsClient"
) -> "DescribeTrainingJobResponseTypeDef":
    """Print the job's state and log until it ends; how it ended."""
    print(f"sagemaker: {job}", flush=True)
    state, tokens = "", dict[str, str]()
    while True:
        description = sagemaker.describe_training_job(TrainingJobName=job)
        if state != description["SecondaryStatus"]:
            state = description["SecondaryStatus"]
            print(f"sagemaker: {state}", flush=True)
        ended = description["TrainingJobStatus"] in ENDED
        if ended:
            time.sleep(POLL_SECONDS)
        print_new_lines(job, logs, tokens)
        if ended:
            return description
        time.sleep(POLL_SECONDS)


def print_new_lines(job: str, logs: "CloudWatchLogsClient", tokens: dict[str, str]) -> None:
    """Those of the job's log streams. `tokens` has how far each one was read."""
    try:
        streams = logs.describe_log_streams(logGroupName=LOG_GROUP, logStreamNamePrefix=f"{job}/")
    except logs.exceptions.ResourceNotFoundException:
        # The first job of an account makes it.
        return
    for stream in [found["logStreamName"] for found in streams["logStreams"]]:
        read = partial(
            logs.get_log_events, logGroupName=LOG_GROUP, logStreamName=stream, startFromHead=True
        )
        while True:
            token = tokens.get(stream)
            page = read(nextToken=token) if token else read()
            for event in page["events"]:
                print(event["message"], flush=True)
            tokens[stream] = page["nextForwardToken"]
            # The same one again is CloudWatch's way to say that there is no more.
            if tokens[stream] == token:
                break


def check_outcome(description: "DescribeTrainingJobResponseTypeDef", inputs: Inputs) -> None:
    """Raise UserError where the job failed, or trained on something else than is here."""
    job, status = description["TrainingJobName"], description["TrainingJobStatus"]
    if status != "Completed":
        # It may have run out of its time, for one.
        reason = description.get("FailureReason") or description["SecondaryStatus"]
        raise UserError(
            f"{job} has {status.lower()} ({' '.join(reason.split())}); a job with the same inputs"
            " goes on from its last checkpoint"
        )
    had = {
        each["ChannelName"]: each["DataSource"]["S3DataSource"]["S3Uri"]
        for each in description["InputDataConfig"]
    }
    if had != {"code": f"{inputs.code}/", "data": f"{inputs.data}/"}:
        raise UserError(
            f"{job} trained on other code, params or data than are here: bring back what it had,"
            " like `git checkout` and `dvc checkout`, and --attach it again"
        )


def how_to_go_on(job: str, options: argparse.Namespace) -> str:
    return (
        f"\nsagemaker: {job} goes on by itself. To follow it again, and to fetch its model:\n"
        f"  python -m cloud.sagemaker {options.model} --bucket {options.bucket} --attach {job}\n"
        f"To stop it:\n"
        f"  aws sagemaker stop-training-job --training-job-name {job}"
    )


if __name__ == "__main__":
    main()
