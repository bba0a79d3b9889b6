"""Messages to users if the bucket's server, credentials or the network are set up wrongly."""

import pickle
import re
import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from stages import fetch
from stages.collecting import reading
from stages.collecting.advice import explained
from stages.collecting.bucket import open_bucket
from stages.collecting.credentials import Credentials
from stages.collecting.listing import list_objects
from stages.formats.shards import read_rejects
from stages.runtime import params, paths
from stages.runtime.errors import UserError
from tests import faults
from tests.conftest import S3, bucket_params, objects_of, write_params
from tests.faults import SECRET, Fault, always, fault_proxy
from tests.test_fetch import prepare
from tools.s3 import free_port
from tools.synthetic import SyntheticBin

OK = b"<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>"
EXPIRED = r"refuses access: the credentials have expired\. Renew them; the next run continues"
INVALID = r"credentials are not valid there\. Check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"


@contextmanager
def answering(
    status: int, body: bytes, context: ssl.SSLContext | None = None
) -> Iterator[tuple[str, list[Message]]]:
    """A server with one answer to all requests. Yields its address and the requests' headers."""
    asked: list[Message] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.headers)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            """Print nothing: some of these clients hang up."""

    with Server(("127.0.0.1", 0), Handler) as server:
        if context:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


def error_page(code: str, more: str = "") -> bytes:
    return f"<Error><Code>{code}</Code><Message>{SECRET}</Message>{more}</Error>".encode()


def at(endpoint: str, *, anonymous: bool = True) -> params.Bucket:
    return params.Bucket(
        url="s3://bins", region="us-east-1", endpoint=endpoint, anonymous=anonymous
    )


def message(source: params.Bucket) -> str:
    """The error message of listing the bucket, which must fail."""
    with pytest.raises(UserError) as caught, explained(source):
        list_objects(open_bucket(source), "metadata/")
    text = str(caught.value)
    assert SECRET not in text
    assert "\n" not in text
    return text


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)


@pytest.fixture
def no_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for AWS's files, no credentials in the environment, and no role."""
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN", "PROFILE"):
        monkeypatch.delenv(f"AWS_{name}", raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    return tmp_path


@pytest.mark.usefixtures("credentials")
@pytest.mark.parametrize(
    ("status", "code", "more", "expected"),
    [
        (
            301,
            "PermanentRedirect",
            "",
            r"set bucket\.region to the one that `curl -sI http\S+bins`",
        ),
        (
            400,
            "AuthorizationHeaderMalformed",
            "<Region>eu-west-1</Region>",
            r"in another region than bucket\.region says: set bucket\.region to eu-west-1",
        ),
        (400, "AuthorizationHeaderMalformed", "<Region>$(rm)</Region>", r"the one that `curl"),
        (400, "ExpiredToken", "", EXPIRED),
        (400, "TokenRefreshRequired", "", EXPIRED),
        (403, "InvalidAccessKeyId", "", INVALID),
        (403, "SignatureDoesNotMatch", "", INVALID),
        (400, "InvalidToken", "", INVALID),
        (403, "RequestTimeTooSkewed", "", "the clock of this machine is wrong"),
        (404, "NoSuchBucket", "", r"does not exist: check bucket\.url and bucket\.endpoint"),
        (403, "AccessDenied", "", "check AWS_ACCESS_KEY_ID and .*, and what they may read"),
    ],
)
def test_s3s_error_code_decides_the_advice_after_one_request(
    status: int, code: str, more: str, expected: str
) -> None:
    with answering(status, error_page(code, more)) as (address, asked):
        text = message(at(f"http://{address}", anonymous=False))
    assert re.search(expected, text), text
    assert len(asked) == 1


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (400, "ExpiredToken", EXPIRED),
        (403, "InvalidAccessKeyId", INVALID),
        (403, "RequestTimeTooSkewed", "the clock of this machine is wrong"),
    ],
)
def test_an_error_of_all_objects_is_not_blamed_on_one(
    s3: S3,
    synthetic: list[SyntheticBin],
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    code: str,
    expected: str,
) -> None:
    monkeypatch.setitem(faults.ERRORS, Fault.DENIED, (status, code))
    source = s3.make_bucket(objects_of(synthetic))
    with fault_proxy(s3.url) as proxy:
        prepare(source.model_copy(update={"endpoint": proxy.url}), synthetic, max_rejects=1.0)
        proxy.plan = lambda _: Fault.DENIED
        with pytest.raises(UserError, match=expected) as caught:
            fetch.main()
    assert SECRET not in str(caught.value)
    assert not paths.RAW.exists()


@pytest.mark.usefixtures("workspace")
def test_a_photograph_in_an_archive_is_named_with_s3s_code(
    s3: S3, synthetic: list[SyntheticBin], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = s3.make_bucket(objects_of(synthetic))
    archived = synthetic[0].id
    monkeypatch.setitem(faults.ERRORS, Fault.DENIED, (403, "InvalidObjectState"))
    with fault_proxy(s3.url) as proxy:
        behind = source.model_copy(update={"endpoint": proxy.url})
        prepare(source, synthetic, max_rejects=0.1)
        write_params({**bucket_params(behind), "fetch.max_rejects": 0.1})
        proxy.plan = always(Fault.DENIED, f"{archived}.jpg")
        fetch.main()
    (reject,) = read_rejects(paths.UNFETCHED)
    assert reject == (archived, "refused: InvalidObjectState")


def test_a_bucket_that_refuses_anonymous_reads_tells_what_to_set() -> None:
    with answering(403, error_page("AccessDenied")) as (address, _):
        text = message(at(f"http://{address}"))
    assert re.search(r"s3://bins.*refuses access.*set bucket\.anonymous to false", text)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the certificates of a private authority and of its server on loopback."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("tls")
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1", "utf-8")
    for command in (
        "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=ours -keyout ca.key -out ca.pem",
        "req -newkey rsa:2048 -nodes -subj /CN=127.0.0.1 -keyout server.key -out server.csr",
        "x509 -req -in server.csr -CA ca.pem -CAkey ca.key -days 2 -extfile names -out server.crt",
    ):
        subprocess.run(["openssl", *command.split()], cwd=folder, check=True, capture_output=True)
    return folder


def test_a_private_certificate_authority_is_named_at_once_and_can_be_trusted(
    authority: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority / "server.crt", authority / "server.key")
    with answering(200, OK, context) as (address, asked):
        text = message(at(f"https://{address}"))
        assert "set SSL_CERT_FILE to its file" in text
        assert "dvc remote modify --local storage ssl_verify" in text
        assert asked == []
        monkeypatch.setenv("SSL_CERT_FILE", str(authority / "ca.pem"))
        assert len(list_objects(open_bucket(at(f"https://{address}")), "metadata/")) == 0


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_a_proxy_from_the_environment_is_named_without_its_password(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setattr(reading, "DEADLINE", 0.3)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    proxy = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv(variable, f"http://user:{SECRET}@{proxy}")
    text = message(at("http://10.0.0.1:9000"))
    assert f"the proxy {proxy} that {variable.upper()} names" in text
    assert "NO_PROXY=10.0.0.1" in text
    assert "Connection refused" in text


def test_a_proxy_that_answers_itself_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with answering(403, b"<html>Not from here</html>") as (address, _):
        monkeypatch.setenv("HTTP_PROXY", f"http://{address}")
        assert f"the proxy {address} that HTTP_PROXY names" in message(at("http://10.0.0.1:9000"))


def test_the_reason_for_a_failed_connection_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "DEADLINE", 0.3)
    text = message(at(f"http://127.0.0.1:{free_port()}"))
    assert "cannot be read: Connection refused. Check bucket.endpoint and the network" in text
    assert "PROXY" not in text


@pytest.mark.parametrize("kind", ["a profile", "a process", "variables"])
def test_the_bucket_is_read_with_the_credentials_that_boto3_finds(
    no_credentials: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    keys = f"aws_access_key_id = a-key\naws_secret_access_key = {SECRET}\n"
    if kind == "a profile":
        (no_credentials / "credentials").write_text(f"[work]\n{keys}", "utf-8")
        (no_credentials / "config").write_text("[profile work]\nregion = eu-west-1\n", "utf-8")
        monkeypatch.setenv("AWS_PROFILE", "work")
    elif kind == "a process":
        answer = f'{{"Version": 1, "AccessKeyId": "a-key", "SecretAccessKey": "{SECRET}"}}'
        (no_credentials / "answer").write_text(answer, "utf-8")
        command = f"credential_process = cat {no_credentials / 'answer'}"
        (no_credentials / "config").write_text(f"[default]\n{command}\n", "utf-8")
    else:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a-key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    with answering(200, OK) as (address, asked):
        list_objects(open_bucket(at(f"http://{address}", anonymous=False)), "metadata/")
    (headers,) = asked
    signed = headers["Authorization"]
    assert "Credential=a-key/" in signed
    # The region is the bucket's, not the profile's.
    assert "/us-east-1/s3/" in signed


def test_missing_credentials_are_named(
    no_credentials: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = at("http://127.0.0.1:9", anonymous=False)
    with pytest.raises(UserError, match=r"AWS credentials: there are none\. Set AWS_ACCESS_KEY_ID"):
        open_bucket(source)
    monkeypatch.setenv("AWS_PROFILE", "nobodys")
    with pytest.raises(UserError, match=r"AWS credentials: The config profile \(nobodys\) could"):
        open_bucket(source)
    assert list(no_credentials.iterdir()) == []


def test_credentials_that_cannot_be_renewed_stop_at_once(
    no_credentials: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = """[profile work]
sso_session = ours
sso_account_id = 1
sso_role_name = reader
[sso-session ours]
sso_region = us-east-1
sso_start_url = https://ours.example/start
"""
    (no_credentials / "config").write_text(config, "utf-8")
    monkeypatch.setenv("AWS_PROFILE", "work")
    monkeypatch.setenv("HOME", str(no_credentials))
    text = message(at("http://127.0.0.1:9", anonymous=False))
    assert "cannot be asked without credentials, which AWS did not give" in text
    assert "SSO" in text


@pytest.mark.usefixtures("credentials")
def test_another_machine_of_a_cluster_finds_its_own_credentials() -> None:
    sent = pickle.dumps(Credentials())
    assert SECRET.encode() not in sent
    assert pickle.loads(sent)()["access_key_id"] == "a-key"  # noqa: S301
