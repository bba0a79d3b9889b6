"""Run the train stage of one model in an Amazon SageMaker job, and fetch its outputs.

This sends the stage's code and inputs to the bucket, starts the job and prints its log. Then it
writes models/<model> and reports/<model>/curves.csv, which `dvc commit --force train@<model>`
records. Ctrl-C leaves the job running; --attach follows it again.
"""

import argparse
import json
import re
import sys
import time
from typing import TYPE_CHECKING, Any

import boto3
from boto3.exceptions import Boto3Error
from botocore.exceptions import BotoCoreError, ClientError

from cloud.sagemaker_files import CURVES, ENTRY, Inputs, collect_inputs, fetch, upload
from stages.runtime import paths
from stages.runtime.errors import UserError
from stages.runtime.params import load_params

if TYPE_CHECKING:
    from mypy_boto3_logs import CloudWatchLogsClient
    from mypy_boto3_sagemaker import SageMakerClient
    from mypy_boto3_sagemaker.type_defs import DescribeTrainingJobResponseTypeDef

#: The instance type of the published experiment, with one A10G and 8 cores.
INSTANCE = "ml.g5.2xlarge"
#: AWS's image with this project's version of torch. The account is that of most regions, as listed
#: in image_uri_config/pytorch-amzn2023.json of sagemaker-core 2.27.
IMAGE = "763104351884.dkr.ecr.{region}.amazonaws.com/pytorch:2.14-cu133-amzn2023-sagemaker"
#: Room for missing packages, the inputs, the packed photographs and the checkpoints.
VOLUME_GB = 50
LOG_GROUP = "/aws/sagemaker/TrainingJobs"
ENDED = ("Completed", "Failed", "Stopped")
#: The time between two looks at a job, and the wait for its last lines, which CloudWatch delays.
POLL_SECONDS = 10
#: Errors whose cause is outside this program.
OUTSIDE = (OSError, Boto3Error, BotoCoreError, ClientError)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    try:
        print(run(options))
    except (UserError, *OUTSIDE) as error:
        sys.exit(f"sagemaker: error: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        print("sagemaker: interrupted", file=sys.stderr)
        sys.exit(130)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m cloud.sagemaker", description=__doc__)
    parser.add_argument("model", help="a key of params.yaml's train block")
    parser.add_argument(
        "--bucket", required=True, help="the folder for inputs and models, as s3://bucket/folder"
    )
    parser.add_argument("--role", help="the ARN of a role that SageMaker may assume")
    parser.add_argument("--instance-type", default=INSTANCE, help="default: %(default)s")
    parser.add_argument("--image", default=IMAGE, help="a PyTorch image; by default that of AWS")
    parser.add_argument(
        "--spot", action="store_true", help="use cheaper instances that AWS may interrupt"
    )
    parser.add_argument(
        "--hours", type=int, default=24, help="stop the job after this time; default: %(default)s"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the request without sending anything"
    )
    parser.add_argument("--attach", metavar="JOB", help="follow this job instead of starting one")
    options = parser.parse_args(arguments)
    if not (options.role or options.attach):
        parser.error("--role is needed: the ARN of a role that SageMaker may assume")
    return options


def run(options: argparse.Namespace) -> str:
    """Do what the options say, and return the text to print at the end."""
    model = options.model
    load_params().model(model)
    session = boto3.Session()
    sagemaker = session.client("sagemaker")
    inputs = collect_inputs(model, options.bucket)
    job = options.attach
    if not job:
        request = training_request(options, inputs, sagemaker.meta.region_name)
        if options.dry_run:
            return json.dumps(request, indent=2)
        upload(inputs, session.resource("s3"))
        sagemaker.create_training_job(**request)
        job = request["TrainingJobName"]
    try:
        description = follow(job, sagemaker, session.client("logs"))
        check_outcome(description, inputs)
        fetch(description["ModelArtifacts"]["S3ModelArtifacts"], model, session.resource("s3"))
    except (KeyboardInterrupt, *OUTSIDE):
        print(how_to_continue(job, options), file=sys.stderr)
        raise
    return (
        f"sagemaker: {paths.MODELS / model} and {paths.REPORTS / model / CURVES} are the outputs of"
        f" {job}: run `dvc commit --force train@{model}`, then `dvc repro`"
    )


def training_request(options: argparse.Namespace, inputs: Inputs, region: str) -> dict[str, Any]:
    """The request for SageMaker's CreateTrainingJob."""
    stopping = {"MaxRuntimeInSeconds": options.hours * 3600}
    if options.spot:
        # This includes the time spent waiting for an instance.
        stopping["MaxWaitTimeInSeconds"] = 2 * options.hours * 3600
    name = re.sub("[^a-z0-9]+", "-", options.model.lower())[:30]
    return {
        "TrainingJobName": f"bins-{name}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}",
        "RoleArn": options.role,
        "AlgorithmSpecification": {
            "TrainingImage": options.image.replace("{region}", region),
            "TrainingInputMode": "File",
            "ContainerEntrypoint": ["python3", f"/opt/ml/input/data/code/{ENTRY.as_posix()}"],
            "ContainerArguments": [options.model],
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
    # The slash excludes other names that begin with that of the folder.
    source = {"S3DataType": "S3Prefix", "S3Uri": f"{url}/"}
    return {"ChannelName": name, "DataSource": {"S3DataSource": source}}


def follow(
    job: str, sagemaker: "SageMakerClient", logs: "CloudWatchLogsClient"
) -> "DescribeTrainingJobResponseTypeDef":
    """Print the job's state and log until it ends, and return its final description."""
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
    """Print new lines of the job's log streams. `tokens` has the position reached in each."""
    try:
        streams = logs.describe_log_streams(logGroupName=LOG_GROUP, logStreamNamePrefix=f"{job}/")
    except logs.exceptions.ResourceNotFoundException:
        # The first job of an account creates the log group.
        return
    for stream in [found["logStreamName"] for found in streams["logStreams"]]:
        while True:
            position: Any = {"nextToken": tokens[stream]} if stream in tokens else {}
            page = logs.get_log_events(
                logGroupName=LOG_GROUP, logStreamName=stream, startFromHead=True, **position
            )
            for event in page["events"]:
                print(event["message"], flush=True)
            # CloudWatch repeats the token if there are no more lines.
            if page["nextForwardToken"] == tokens.get(stream):
                break
            tokens[stream] = page["nextForwardToken"]


def check_outcome(description: "DescribeTrainingJobResponseTypeDef", inputs: Inputs) -> None:
    """Raise UserError if the job failed, or trained on something other than what is here."""
    job, status = description["TrainingJobName"], description["TrainingJobStatus"]
    if status != "Completed":
        # A job that was stopped, for example after --hours, has no FailureReason.
        reason = description.get("FailureReason") or description["SecondaryStatus"]
        raise UserError(
            f"{job} has {status.lower()} ({reason}); another job with the same inputs continues"
            " from its last checkpoint"
        )
    had = [each["DataSource"]["S3DataSource"]["S3Uri"] for each in description["InputDataConfig"]]
    if sorted(had) != [f"{inputs.code}/", f"{inputs.data}/"]:
        raise UserError(
            f"{job} trained with other code, params or data than this checkout has: restore those,"
            " for example with `git checkout` and `dvc checkout`, and --attach to it again"
        )


def how_to_continue(job: str, options: argparse.Namespace) -> str:
    return (
        f"\nsagemaker: {job} keeps running. To follow it again and fetch its model:\n"
        f"  python -m cloud.sagemaker {options.model} --bucket {options.bucket} --attach {job}\n"
        f"To stop it:\n"
        f"  aws sagemaker stop-training-job --training-job-name {job}"
    )


if __name__ == "__main__":
    main()
