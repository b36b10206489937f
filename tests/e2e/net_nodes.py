"""Nodes for tests: network namespaces on one switch, whose links can be slowed down and cut. Needs root and `ip`."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

SUBNET = "10.201.77"
HUB_ADDRESS = f"{SUBNET}.1"


def why_not() -> str:
    """Return what is missing for namespaces, empty: nothing."""
    if shutil.which("ip") is None:
        return "ip is missing: apt-get install iproute2"
    if os.geteuid() != 0:
        return "network namespaces need root"
    done = _ip("netns", "add", f"ct{os.getpid()}-try", check=False)
    if done.returncode:
        return f"network namespaces cannot be made here: {done.stderr.strip()}"
    _ip("netns", "del", f"ct{os.getpid()}-try")
    return ""


class Network:
    """A switch in a namespace of its own, which has HUB_ADDRESS itself, and nodes with one link to it each."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self.hub = self._add("hub")
        _ip("-n", self.hub, "link", "add", "switch", "type", "bridge")
        _ip("-n", self.hub, "addr", "add", f"{HUB_ADDRESS}/24", "dev", "switch")
        _ip("-n", self.hub, "link", "set", "switch", "up")

    def add_node(self, name: str) -> str:
        """Return the namespace of a new node with a link to the switch."""
        node, number = self._add(name), len(self._names)
        _ip("-n", node, "link", "add", "eth0", "type", "veth", "peer", "name", name, "netns", self.hub)
        _ip("-n", node, "addr", "add", f"{SUBNET}.{number}/24", "dev", "eth0")
        _ip("-n", node, "link", "set", "eth0", "up")
        _ip("-n", self.hub, "link", "set", name, "master", "switch", "up")
        return node

    def cut(self, name: str) -> None:
        """Let nothing pass a node's link, in neither direction."""
        _ip("-n", self.hub, "link", "set", name, "down")

    def join(self, name: str) -> None:
        """Undo `cut`."""
        _ip("-n", self.hub, "link", "set", name, "up")

    def slow_down(self, name: str, kbytes_per_s: int) -> bool:
        """Let a node send no more than so much; False: the kernel has no means for it."""
        shape = ["tbf", "rate", f"{8 * kbytes_per_s}kbit", "burst", "32kb", "latency", "200ms"]
        command = ["tc", "-n", f"ct{os.getpid()}-{name}", "qdisc", "replace", "dev", "eth0", "root", *shape]
        return subprocess.run(command, check=False, capture_output=True).returncode == 0

    def speed_up(self, name: str) -> None:
        """Undo `slow_down`."""
        command = ["tc", "-n", f"ct{os.getpid()}-{name}", "qdisc", "del", "dev", "eth0", "root"]
        subprocess.run(command, check=False, capture_output=True)

    def remove(self) -> None:
        """Remove all namespaces, and the links with them."""
        for name in self._names:
            _ip("netns", "del", name, check=False)

    def _add(self, name: str) -> str:
        namespace = f"ct{os.getpid()}-{name}"
        _ip("netns", "add", namespace)
        self._names.append(namespace)
        _ip("-n", namespace, "link", "set", "lo", "up")
        return namespace


@contextmanager
def network() -> Iterator[Network]:
    """Make a network, and remove it whatever happens."""
    made = Network()
    try:
        yield made
    finally:
        made.remove()


def inside(namespace: str) -> tuple[str, ...]:
    """Return what to put before a command so that it runs there."""
    return ("ip", "netns", "exec", namespace)


def _ip(*arguments: str, check: bool = True) -> subprocess.CompletedProcess:
    return subprocess.run(["ip", *arguments], check=check, capture_output=True, text=True)
