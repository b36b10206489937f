"""The Kubernetes example is what Kubernetes takes, and server and engines in it meet at the same places."""

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from cachetier.cli import serve
from cachetier.core.config import ConnectorConfig, from_mapping

PAGE = Path(__file__).parents[2] / "deploy" / "kubernetes.yaml"
VERSION = "1.34"
DOCUMENTS: list[dict[str, Any]] = list(yaml.safe_load_all(PAGE.read_text()))


def pod_of(kind: str) -> dict[str, Any]:
    [document] = [each for each in DOCUMENTS if each["kind"] == kind]
    spec: dict[str, Any] = document["spec"]["template"]["spec"]
    return spec


def places(pod: dict[str, Any], container: dict[str, Any]) -> dict[str, str]:
    """Return the folders of the node that a container sees, by where it sees them."""
    on_node = {volume["name"]: volume["hostPath"]["path"] for volume in pod["volumes"] if "hostPath" in volume}
    mounts = container["volumeMounts"]
    return {mount["mountPath"]: on_node[mount["name"]] for mount in mounts if mount["name"] in on_node}


SERVER, ENGINE = pod_of("DaemonSet"), pod_of("Deployment")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document["kind"])
def test_every_object_fits_the_schema(document: dict[str, Any]) -> None:
    kubernetes_validate.validate(document, VERSION, strict=True)


def test_a_wrong_field_or_type_does_not() -> None:
    for place, name, value in ((SERVER, "hostPaths", []), (SERVER["containers"][0], "image", 3)):
        assert name not in place or place[name] != value
        document = copy.deepcopy(next(each for each in DOCUMENTS if each["kind"] == "DaemonSet"))
        spec = document["spec"]["template"]["spec"]
        (spec if place is SERVER else spec["containers"][0])[name] = value
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(document, VERSION, strict=True)


def test_engines_see_the_servers_socket_and_arena_where_it_says_they_are() -> None:
    server, engine = places(SERVER, SERVER["containers"][0]), places(ENGINE, ENGINE["containers"][0])
    for shared in ("/run/cachetier", "/dev/shm"):
        assert server[shared] == engine[shared]
    assert "/var/lib/cachetier" in server
    users = [pod["securityContext"]["runAsUser"] for pod in (SERVER, ENGINE)]
    assert users[0] == users[1], "socket and arena are closed to other users"


def test_the_folders_are_made_for_the_user_that_uses_them() -> None:
    [init] = SERVER["initContainers"]
    user = str(SERVER["securityContext"]["runAsUser"])
    assert init["command"][: -len(init["volumeMounts"])] == ["install", "-d", "-m", "0700", "-o", user, "-g", user]
    assert set(places(SERVER, init)) == {"/var/lib/cachetier", "/run/cachetier"} <= set(init["command"])


def test_all_commands_and_settings_are_real() -> None:
    parser = argparse.ArgumentParser()
    serve.add_parser(parser.add_subparsers())
    container = SERVER["containers"][0]
    assert container["command"] == ["cachetier", "serve"]
    config = serve.server_config(parser.parse_args(["serve", *container["args"]]))
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {config.data_dir, str(Path(config.socket).parent), str(Path(config.token_file).parent)} <= mounted
    assert config.tcp.endswith(f":{container['ports'][0]['containerPort']}")
    limit_gib = int(container["resources"]["limits"]["memory"].removesuffix("Gi"))
    assert config.host_bytes < limit_gib << 30, "the arena counts for who touches it"
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[name]["exec"]["command"] == ["cachetier", "stats", "--socket", config.socket]
    options = dict(arg.removeprefix("--").split("=", 1) for arg in ENGINE["containers"][0]["args"][1:])
    transfer, events = json.loads(options["kv-transfer-config"]), json.loads(options["kv-events-config"])
    extra = from_mapping(ConnectorConfig, transfer["kv_connector_extra_config"], PAGE.name)
    assert extra.server == f"unix:{config.socket}"
    assert events["enable_kv_cache_events"] is True
