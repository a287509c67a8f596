"""The cluster files: Ray's own validation takes them, refuses broken ones, and what they say is true of this code."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from typer.testing import CliRunner

from holoray.cli.main import app
from holoray.kernels.registry import warm_accumulators

pytestmark = pytest.mark.ray

ROOT: Final = Path(__file__).resolve().parents[1]
AWS, ONPREM = ROOT / "cluster.yaml", ROOT / "deploy/cluster-onprem.yaml"
BOTH: Final = pytest.mark.parametrize("path", [AWS, ONPREM], ids=["aws", "onprem"])
CORES_AND_GPUS: Final = {"m6i.4xlarge": (16, 0), "g5.12xlarge": (48, 4)}  # as AWS states them
UNITS: Final = {"gb": 1 << 30, "mb": 1 << 20}

Config = dict[str, Any]


def read(path: Path) -> Config:
    config: Config = yaml.safe_load(path.read_text(encoding="utf-8"))
    return config


def accept(config: Config) -> Config:
    """What `ray up` does before it asks for machines."""
    prepared: Config = prepare_config(config)
    validate_config(prepared)
    return prepared


@BOTH
def test_ray_accepts(path: Path) -> None:
    prepared = accept(read(path))
    assert prepared["head_node_type"] in prepared["available_node_types"]
    assert prepared["max_workers"] == 2


def unknown_key(config: Config) -> None:
    config["holoray"] = True


def unknown_docker_key(config: Config) -> None:
    config["docker"]["shm_size"] = "40gb"


def bad_head_type(config: Config) -> None:
    config["head_node_type"] = "tail"


def too_few_workers(config: Config) -> None:
    config["available_node_types"]["gpu"]["min_workers"] = 3


def no_provider(config: Config) -> None:
    del config["provider"]


def no_container(config: Config) -> None:
    del config["docker"]["container_name"]


def fractional_gpu(config: Config) -> None:
    config["available_node_types"]["gpu"]["resources"]["GPU"] = 0.5


def no_name(config: Config) -> None:
    config["cluster_name"] = None


def no_addresses(config: Config) -> None:
    del config["provider"]["worker_ips"]


def node_types_on_premises(config: Config) -> None:
    config["available_node_types"] = read(AWS)["available_node_types"]


@pytest.mark.parametrize(
    ("path", "harm", "message"),
    [
        (AWS, unknown_key, "'holoray' was unexpected"),
        (AWS, unknown_docker_key, "'shm_size' was unexpected"),
        (AWS, bad_head_type, "must be one of"),
        (AWS, too_few_workers, "smaller than the sum"),
        (AWS, no_provider, "provider"),
        (AWS, no_container, "container"),
        (AWS, fractional_gpu, "not of type 'integer'"),
        (AWS, no_name, "None is not of type 'string'"),
        (ONPREM, unknown_key, "'holoray' was unexpected"),
        (ONPREM, no_provider, "provider"),
        (ONPREM, no_addresses, "worker_ips"),
        (ONPREM, node_types_on_premises, "not supported"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_ray_refuses(path: Path, harm: Callable[[Config], None], message: str) -> None:
    config = read(path)
    harm(config)
    with pytest.raises(Exception, match=message):  # of many types, few of them Ray's
        accept(config)


@BOTH
def test_the_images_have_the_pinned_ray(path: Path) -> None:
    (version,) = re.findall(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    images = [value for key, value in read(path)["docker"].items() if key.endswith("image")]
    assert images
    for image in images:
        assert re.fullmatch(rf"rayproject/ray:{re.escape(version)}-py3(11|12|13)-(cpu|gpu)", image)


@BOTH
def test_shared_memory_has_room_for_weights_and_the_object_store(path: Path) -> None:
    config = read(path)
    options = dict(
        part.partition("=")[::2] for option in config["docker"]["run_options"] for part in shlex.split(option)
    )
    size, unit = re.fullmatch(r"(\d+)(gb|mb)", options["--shm-size"]).groups()  # type: ignore[union-attr]
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        flags = start_flags(config, commands)
        assert int(flags["--object-store-memory"]) < int(size) * UNITS[unit] / 4


def start_flags(config: Config, commands: str) -> dict[str, str]:
    """The options of `ray start`, the last command."""
    stop, start = config[commands]
    assert stop == "ray stop"
    limits, _, command = start.partition("; ")
    assert limits == "ulimit -n 65536"
    words = shlex.split(command)
    assert words[:3] == ["RAY_worker_niceness=0", "ray", "start"]
    return dict(word.partition("=")[::2] for word in words[3:])


@BOTH
def test_nodes_are_started_as_ray_needs_it(path: Path) -> None:
    config = read(path)
    head, worker = (start_flags(config, f"{kind}_start_ray_commands") for kind in ("head", "worker"))
    assert "--head" in head
    assert head["--autoscaling-config"] == "~/ray_bootstrap_config.yaml"
    assert head["--dashboard-host"] == "127.0.0.1"
    assert worker["--address"] == f"$RAY_HEAD_IP:{head['--port']}"
    assert head["--metrics-export-port"] == worker["--metrics-export-port"]
    assert any("--ulimit nofile=65536" in option for option in config["docker"]["run_options"])
    assert any("NCCL_" in option for option in config["docker"]["run_options"])


def test_resources_are_those_of_the_machines() -> None:
    config = read(AWS)
    for name, node in config["available_node_types"].items():
        cores, gpus = CORES_AND_GPUS[node["node_config"]["InstanceType"]]
        resources = node["resources"]
        assert resources.get("GPU", 0) == gpus
        assert resources["CPU"] == (0 if name == config["head_node_type"] else cores)


@BOTH
def test_what_is_installed_is_what_make_wheel_makes(path: Path) -> None:
    config = read(path)
    assert config["file_mounts"]["~/dist"] == "dist"
    install, compile_kernels = config["setup_commands"]
    assert install == "pip install --constraint ~/dist/constraints.txt ~/dist/holoray-*.whl"
    assert compile_kernels == 'python -c "from holoray.kernels.registry import warm_accumulators; warm_accumulators()"'
    assert callable(warm_accumulators)
    assert "--wheel-dir dist" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_documented_jobs_use_options_that_exist() -> None:
    documented = re.findall(r"-- (holoray warmup [^\n]+)", (ROOT / "docs/cluster.md").read_text(encoding="utf-8"))
    assert documented
    known = CliRunner().invoke(app, ["warmup", "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
    for command in documented:
        for option in re.findall(r" (--[a-z-]+)", command):
            assert option in known
        assert "--address auto" in command
