"""cluster.yaml: accepted by Ray's own validator, and right where that validator does not look.

The validator knows the keys of the top level and counts workers; a typo inside `provider` or `node_config` passes it and fails on the cloud.
So the keys below it are compared with the ones that Ray's AWS provider and EC2's RunInstances know.
"""

import copy
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
FILE = ROOT / "cluster.yaml"

PROVIDER = {"type", "region", "availability_zone", "cache_stopped_nodes", "use_internal_ips", "security_group", "key_pair", "cloudwatch", "aws_credentials"}
AUTH = {"ssh_user", "ssh_private_key", "ssh_public_key", "ssh_proxy_command"}
# EC2's RunInstances, less the counts and networks that Ray sets itself.
NODE_CONFIG = {
    "InstanceType": None, "ImageId": None, "KeyName": None, "IamInstanceProfile": {"Arn": None, "Name": None}, "SecurityGroupIds": None, "SubnetIds": None,
    "BlockDeviceMappings": {"DeviceName": None, "Ebs": {"VolumeSize": None, "VolumeType": None, "Iops": None, "Throughput": None, "Encrypted": None, "DeleteOnTermination": None}},
    "InstanceMarketOptions": {"MarketType": None, "SpotOptions": {"MaxPrice": None, "InstanceInterruptionBehavior": None}}, "TagSpecifications": None, "UserData": None,
}  # fmt: skip


@pytest.fixture
def config() -> dict:
    return yaml.safe_load(FILE.read_text(encoding="utf-8"))


def validate(config: dict) -> dict:
    """The config with Ray's defaults filled in. Raises what `ray up` would."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    whole = prepare_config(copy.deepcopy(config))
    validate_config(whole)
    return whole


def unknown(value: object, known: dict | None, path: str = "") -> list[str]:
    """Paths of the keys in `value` that `known` does not have; None knows no keys below."""
    if isinstance(value, list):
        return [key for item in value for key in unknown(item, known, path)]
    if not isinstance(value, dict) or known is None:
        return []
    return [key for name, below in value.items() for key in ([f"{path}{name}"] if name not in known else unknown(below, known[name], f"{path}{name}."))]


def commands(config: dict) -> dict[str, str]:
    """Every list of commands as one text."""
    return {name: "\n".join(value) for name, value in config.items() if name.endswith("_commands")}


def uncommented(marker: str) -> str:
    """cluster.yaml with the commented lines from the one holding `marker` on made live."""
    return re.sub(rf"(?m)^(\s*)# ({marker}.*)\n\s*# (\s*.*)$", r"\1\2\n\1\3", FILE.read_text(encoding="utf-8"))


def test_ray_accepts_it(config):
    assert validate(config)["cluster_name"] == "faultline"


def test_ray_refuses_an_unknown_key(config):
    from jsonschema import ValidationError

    with pytest.raises(ValidationError, match="max_wrokers"):
        validate(config | {"max_wrokers": 3})


def test_ray_refuses_an_impossible_number_of_workers(config):
    config["available_node_types"]["gpu"]["min_workers"] = config["max_workers"] + 1
    with pytest.raises(ValueError, match="max_workers"):
        validate(config)


def test_ray_refuses_a_head_that_is_no_node_type(config):
    with pytest.raises(ValueError, match="head_node_type"):
        validate(config | {"head_node_type": "haed"})


def nested_faults(config: dict) -> list[str]:
    faults = [f"provider.{key}" for key in config["provider"].keys() - PROVIDER] + [f"auth.{key}" for key in config["auth"].keys() - AUTH]
    for name, node in config["available_node_types"].items():
        faults += unknown(node["node_config"], NODE_CONFIG, f"{name}.")
    return faults


def test_keys_below_the_top_are_known(config):
    assert nested_faults(config) == []


@pytest.mark.parametrize(
    ("place", "typo", "found"),
    [
        (lambda c: c["provider"], "cached_stopped_nodes", "provider.cached_stopped_nodes"),
        (lambda c: c["auth"], "ssh_usr", "auth.ssh_usr"),
        (lambda c: c["available_node_types"]["gpu"]["node_config"], "InstanceTyp", "gpu.InstanceTyp"),
        (lambda c: c["available_node_types"]["head"]["node_config"]["BlockDeviceMappings"][0]["Ebs"], "VolumeSiez", "head.BlockDeviceMappings.Ebs.VolumeSiez"),
    ],
    ids=["provider", "auth", "node_config", "disk"],
)
def test_a_typo_below_the_top_is_found(config, place, typo, found):
    place(config)[typo] = 1
    assert nested_faults(config) == [found]


def test_the_commented_spot_option_is_valid(config):
    live = yaml.safe_load(uncommented("InstanceMarketOptions"))
    assert live["available_node_types"]["gpu"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert live != config and nested_faults(live) == []
    validate(live)


def test_ec2_accepts_the_nodes(config):
    pytest.importorskip("botocore", reason="EC2's own model of RunInstances comes with botocore")
    from botocore.session import get_session
    from botocore.validate import ParamValidator

    request = get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    for node in config["available_node_types"].values():
        assert not ParamValidator().validate(node["node_config"] | {"MinCount": 1, "MaxCount": 1}, request).generate_report()


def test_gpu_workers_can_come_and_go(config):
    """The head has no GPU and takes no tasks; some worker type has both, none need be there, and the counts agree."""
    nodes = validate(config)["available_node_types"]
    head = nodes.pop(config["head_node_type"])
    assert not head["resources"].get("GPU") and head["resources"]["CPU"] == 0 and head["max_workers"] == 0
    gpu = [node for node in nodes.values() if node["resources"].get("GPU", 0) >= 1]
    assert gpu and all(node["resources"]["CPU"] >= 1 for node in gpu)
    for node in nodes.values():
        assert 0 == node["min_workers"] < node["max_workers"] <= config["max_workers"]
    assert config["idle_timeout_minutes"] > 0


def test_what_is_copied_exists_here(config):
    copied = {remote: local for remote, local in config["file_mounts"].items() if not local.startswith("~")}
    missing = [local for local in copied.values() if not (ROOT / local).exists()]
    assert missing == []
    assert all(remote == f"/home/{config['auth']['ssh_user']}/faultline/{Path(local).name}" for remote, local in copied.items())


def test_every_package_is_copied(config):
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    copied = {Path(local).name for local in config["file_mounts"].values()}
    assert {name.split(".")[0] for name in project["tool"]["setuptools"]["packages"]} | {"pyproject.toml", "requirements.lock", project["project"]["readme"]} <= copied


def test_all_nodes_install_the_locked_project(config):
    setup = commands(config)["setup_commands"]
    for file in re.findall(r"~/faultline/(\S+)", setup):
        assert (ROOT / file).exists(), f"setup_commands refer to {file}, which the repository does not have"
    assert "-r ~/faultline/requirements.lock" in setup and "--no-deps -e ~/faultline" in setup


def test_ray_is_started_as_an_autoscaling_cluster(config):
    text = commands(config)
    assert "--head" in text["head_start_ray_commands"] and "--autoscaling-config=~/ray_bootstrap_config.yaml" in text["head_start_ray_commands"]
    assert "--address=$RAY_HEAD_IP:6379" in text["worker_start_ray_commands"] and "--port=6379" in text["head_start_ray_commands"]


def test_no_node_joins_without_the_shared_file_system_and_the_token(config):
    text = commands(config)
    assert all(config[f"{kind}_start_ray_commands"][0] == "mountpoint -q /mnt/faultline" for kind in ("head", "worker"))
    assert "RAY_AUTH_MODE=token" in text["initialization_commands"]
    assert f"/home/{config['auth']['ssh_user']}/.ray/auth_token" in config["file_mounts"]
    assert "--dashboard-host=127.0.0.1" in text["head_start_ray_commands"]
