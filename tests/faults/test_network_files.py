"""One sweep directory on a network file system: two machines' mounts of one folder, by sshfs over the loopback device.

With sshfs's own cache off, so that who opens a file sees what was closed before, as NFS promises: with its default one a
reader may get a new file cut at an old one's size. Needs root, FUSE, and Debian's packages sshfs and openssh-server.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

SSHD = """Port {port}
ListenAddress 127.0.0.1
HostKey {own}/host
AuthorizedKeysFile {own}/user.pub
StrictModes no
UsePAM no
PidFile {own}/pid
Subsystem sftp internal-sftp
"""


@pytest.fixture
def mounts(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """Two mounts of one folder."""
    paths = os.pathsep.join([os.environ["PATH"], "/usr/sbin"])
    found = {name: shutil.which(name, path=paths) for name in ("sshd", "ssh-keygen", "sshfs", "fusermount")}
    missing = [name for name, path in found.items() if not path]
    if missing or os.geteuid() or not Path("/dev/fuse").exists():
        pytest.skip(
            f"needs root, /dev/fuse, sshfs and openssh-server; not here: {', '.join(missing) or 'root or FUSE'}"
        )
    own, served, *seen = (tmp_path / name for name in ("ssh", "served", "one", "other"))
    for folder in (own, served, *seen):
        folder.mkdir()
    for key in ("host", "user"):
        subprocess.run([str(found["ssh-keygen"]), "-q", "-t", "ed25519", "-N", "", "-f", own / key], check=True)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    (own / "config").write_text(SSHD.format(port=port, own=own))
    Path("/run/sshd").mkdir(exist_ok=True)
    server = subprocess.Popen([str(found["sshd"]), "-D", "-e", "-f", own / "config"], stderr=subprocess.DEVNULL)
    try:
        for folder in seen:
            options = f"port={port},IdentityFile={own}/user,StrictHostKeyChecking=no,UserKnownHostsFile=/dev/null,ConnectionAttempts=20"
            options += ",dir_cache=no,attr_timeout=0,entry_timeout=0,negative_timeout=0"
            subprocess.run(
                [str(found["sshfs"]), "-o", options, f"root@127.0.0.1:{served}", folder],
                check=True, capture_output=True, timeout=60,
            )  # fmt: skip
        yield seen[0], seen[1]
    finally:
        for folder in seen:
            subprocess.run([str(found["fusermount"]), "-uz", folder], check=False, capture_output=True)
        server.terminate()
        server.wait(30)


@pytest.mark.slow
def test_two_machines_on_one_network_folder(fault, launcher, undisturbed, mounts, tmp_path):
    """launchers at once, each on its own mount"""
    here, there = mounts
    log = tmp_path / "starts"
    both = [launcher(folder=here, count=str(log)), launcher(folder=there, count=str(log), out_of_sight=True)]
    ends = [one.wait() for one in both]
    fault.tried += 2
    assert [code for code, _ in ends] == [0, 0], ends
    fault.compare(undisturbed, there / "sweeps/s", starts=log)


@pytest.mark.slow
def test_one_of_two_machines_dies(fault, launcher, undisturbed, mounts):
    """a launcher killed on one mount, its lease taken on the other"""
    here, there = mounts
    victim = launcher(folder=here, out_of_sight=True)
    victim.until(lambda: any(list(p.glob("history.jsonl")) for p in (here / "sweeps/s/runs").glob("*")))
    victim.kill()
    fault.tried += 1
    code, out = launcher(folder=there, impatient=0.5).wait()
    assert code == 0, out
    fault.compare(undisturbed, there / "sweeps/s")
