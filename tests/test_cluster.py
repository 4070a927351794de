"""A study on a Ray cluster of several nodes, as `docs/cluster.md` has it, but all of them on this machine."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from disturbance import descendants
from services import S3_SECRET, _s3, bucket, free_port  # noqa: F401 (fixtures)
from study_fixtures import DENSE, ENVIRONMENT, results_at, run_at, substance, write_study

ROOT = Path(__file__).parents[1]
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
LONG = {"protocol": {"steps": 1500, "eval_every": 100}, "execution": {"checkpoint_seconds": 0.1}}

pytestmark = [pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@dataclass
class Cluster:
    """A head that holds no unit, and nodes of one CPU each; each has a process group and a folder of its own."""

    folder: Path
    environment: dict[str, str]
    port: int = field(default_factory=free_port)
    dashboard: int = field(default_factory=free_port)
    nodes: dict[str, subprocess.Popen] = field(default_factory=dict)
    homes: list[str] = field(default_factory=list)

    def start(self, name: str, *options: str) -> None:
        home = tempfile.mkdtemp(prefix=f"ray-{name}-", dir="/tmp")  # sockets' paths have to be short
        self.homes.append(home)
        # The default port of a node's agent is fixed: on a machine with another Ray, no agent would take jobs.
        options = (*options, f"--dashboard-agent-listen-port={free_port()}")
        with (self.folder / f"{name}.log").open("wb") as log:
            self.nodes[name] = subprocess.Popen(
                [*RAY, "start", "--block", "--node-ip-address=127.0.0.1", "--disable-usage-stats", *options],
                env=self.environment | {"RAY_TMPDIR": home, "TMPDIR": home},
                cwd=self.folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def start_head(self) -> None:
        ports = [f"--port={self.port}", f"--dashboard-port={self.dashboard}", "--dashboard-host=127.0.0.1"]
        self.start("head", "--head", "--num-cpus=0", "--num-gpus=0", "--include-dashboard=true", *ports)
        self.wait_for("the job server", lambda: self.client("job", "list", timeout=300).returncode == 0)

    def start_worker(self, name: str) -> None:
        self.start(name, f"--address=127.0.0.1:{self.port}", "--num-cpus=1", "--num-gpus=0")

    def client(self, *arguments: str, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess:
        """Ray's command line, as a user of the cluster has it."""
        own = {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{self.dashboard}"} | environment
        return subprocess.run(
            [*RAY, *arguments],
            env=self.environment | own,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def wait_for(self, what: str, is_there, seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while not is_there():
            for name, node in self.nodes.items():
                assert node.poll() is None, f"{name} ended: {(self.folder / f'{name}.log').read_text()[-2000:]}"
            assert time.monotonic() < deadline, f"{what} did not come"
            time.sleep(0.2)

    def kill(self, name: str) -> None:
        """End a node at once, with all its workers: nothing of it says goodbye."""
        node = self.nodes.pop(name)
        for pid in [node.pid, *descendants(node.pid)]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        node.wait()


@pytest.fixture
def cluster(tmp_path) -> Iterator[Cluster]:
    """A cluster whose every part asks for a token."""
    token = tmp_path / "auth_token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    mine = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    own["RAY_raylet_start_wait_time_s"] = "300"  # a busy machine takes long to start a node
    made = Cluster(tmp_path, mine | ENVIRONMENT | own)
    yield made
    for name in reversed(list(made.nodes)):
        made.kill(name)
    for home in made.homes:
        shutil.rmtree(home, ignore_errors=True)


# The file for Ray's cluster launcher ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster_file():
    import yaml

    return yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))


def test_cluster_file_is_one_of_this_ray(cluster_file):
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(cluster_file))


def test_cluster_file_with_a_mistake_would_be_noticed(cluster_file):
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    with pytest.raises(jsonschema.ValidationError, match="'worker_setup' was unexpected"):
        validate_config(prepare_config(cluster_file | {"worker_setup": []}))


def test_cluster_file_installs_the_versions_of_this_project(cluster_file):
    import ray

    images = [cluster_file["docker"][name] for name in ("image", "head_image")]
    assert all(re.fullmatch(rf"rayproject/ray:{re.escape(ray.__version__)}-py311-(cpu|gpu)", image) for image in images)
    [install] = [command for command in cluster_file["setup_commands"] if "pip install" in command]
    assert "--constraint constraints.txt" in install


def test_cluster_file_lets_nothing_listen_beyond_the_machine(cluster_file):
    started = " ".join(cluster_file["head_start_ray_commands"] + cluster_file["worker_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in started
    assert "--host 127.0.0.1" in started
    assert "0.0.0.0" not in (ROOT / "cluster.yaml").read_text(encoding="utf-8")
    assert "--env RAY_AUTH_MODE=token" in cluster_file["docker"]["run_options"]
    assert "InstanceMarketOptions" not in cluster_file["available_node_types"]["head"]["node_config"]


# A cluster of several nodes -------------------------------------------------------------------------------------------


@pytest.mark.fault
@pytest.mark.service
def test_study_as_a_job_outlives_a_node_killed_in_the_middle(cluster, bucket):  # noqa: F811
    file = write_study(cluster.folder, **LONG)
    cluster.environment |= {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    cluster.start_head()
    for n, name in enumerate(("first", "second")):
        cluster.start_worker(name)
        cluster.wait_for("a node", lambda n=n: n_alive(cluster) == n + 2)

    refused = cluster.client("job", "list", RAY_AUTH_TOKEN_PATH=str(wrong_token(cluster.folder)))
    assert refused.returncode != 0
    assert "job_id" not in refused.stdout

    command = f"-m study run {file} --dir {cluster.folder / 'kept'} --storage {bucket}/here --address auto"
    job = ("job", "submit", "--no-wait", "--submission-id", "the-study", "--", sys.executable, *command.split())
    attempts: list[subprocess.CompletedProcess] = []

    def submitted() -> bool:
        attempts.append(cluster.client(*job))
        return "No available agent" not in attempts[-1].stderr  # which Ray says until the head's has started

    cluster.wait_for("the agent that takes jobs", submitted)
    assert attempts[-1].returncode == 0, attempts[-1].stdout + attempts[-1].stderr

    def logs() -> str:
        return cluster.client("job", "logs", "the-study").stdout

    cluster.wait_for("the first results", lambda: len(re.findall(r"^\d/8 ", logs(), re.MULTILINE)) >= 2)
    cluster.kill("second")
    cluster.wait_for("the end of the job", lambda: re.search("succeeded|failed|stopped", status(cluster)), 400)
    said = logs()
    assert "'the-study' succeeded" in status(cluster), said
    assert "4 trials, 8 runs complete" in said
    assert S3_SECRET not in said
    run_at(file, cluster.folder / "undisturbed")
    assert substance(cluster.folder / "kept") == substance(cluster.folder / "undisturbed")
    assert all(result.state == "complete" for result in results_at(cluster.folder / "kept").values())
    assert not (cluster.folder / "kept" / "storage").exists()


def wrong_token(folder: Path) -> Path:
    path = folder / "another_token"
    path.write_text(secrets.token_hex(32))
    return path


def status(cluster: Cluster) -> str:
    return cluster.client("job", "status", "the-study").stdout


def n_alive(cluster: Cluster) -> int:
    script = f"import json, ray; ray.init('127.0.0.1:{cluster.port}', log_to_driver=False); "
    script += "print('nodes', json.dumps([node['Alive'] for node in ray.nodes()]))"
    asked = subprocess.run(
        [sys.executable, "-c", script],
        env=cluster.environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    found = re.search(r"^nodes (.*)$", asked.stdout, re.MULTILINE)
    return sum(json.loads(found.group(1))) if found else 0


@pytest.mark.fault
def test_driver_on_a_cluster_lends_it_no_folder_and_one_of_another_ray_is_refused_in_one_line(cluster):
    file = write_study(cluster.folder, seeds=1, arms=[DENSE])
    cluster.start_head()
    cluster.start_worker("first")
    cluster.wait_for("a node", lambda: n_alive(cluster) == 2)
    cwd = cluster.folder / "cwd"
    for name in ("study", "mpo_core", "analysis"):
        shutil.copytree(ROOT / name, cwd / name, ignore=shutil.ignore_patterns("__pycache__"))
    training = cwd / "study" / "training" / "train.py"
    training.write_text(training.read_text(encoding="utf-8").replace("loss += nn", "loss += 10 * nn"), encoding="utf-8")

    def run(directory: str, **environment: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-P", "-m", "study", "run", str(file), "--dir", str(cluster.folder / directory)]
        return subprocess.run(
            [*command, "--tracking", "off", "--address", f"127.0.0.1:{cluster.port}"],
            env=cluster.environment | environment,
            cwd=cwd,
            capture_output=True,
            text=True,
            check=False,
        )

    ended = run("kept")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    run_at(file, cluster.folder / "here")
    assert substance(cluster.folder / "kept") == substance(cluster.folder / "here")

    older = cluster.folder / "older"
    older.mkdir()
    (older / "sitecustomize.py").write_text("import ray\nray.__version__ = '2.59.0'\n")
    refused = run("refused", PYTHONPATH=f"{older}{os.pathsep}{ROOT}")
    assert refused.returncode == 2
    [line] = refused.stderr.splitlines()
    assert "Version mismatch" in line
    assert "2.59.0" in line
