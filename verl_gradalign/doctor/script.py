# SPDX-License-Identifier: Apache-2.0
"""What a launch script would start, seen without starting it: its real argument list, folder and variables.

    launch = launch_of(["bash", "run.sh", "+gradalign=cosine"])
    launch.overrides, launch.folder, launch.variables

The script runs under bash with stand-ins for Python, launchers and whatever installs, fetches or deletes; they note
what they are given and end at once. A Python that is called by its path, or that an activated environment puts first,
ends as well (`sitecustomize`). There is no network where the system allows to take it away, HOME is a folder of links
to what the real one holds, and there is a time limit. What the script's own lines write is written.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from verl_gradalign.errors import refuse

ENTRY = "verl.trainer.main_ppo"
TIME_LIMIT_S = 60.0
GRACE_S = 1.0
"""After the first launch that is seen: a script may start the next one at once."""
LAUNCHERS = (
    "python python3 python3.10 python3.11 python3.12 uv uvx poetry pdm ray torchrun accelerate deepspeed mpirun srun "
    "sbatch salloc scontrol docker podman apptainer singularity nsys numactl conda mamba micromamba"
).split()
OTHERS = (
    "pip pip3 hf huggingface-cli modelscope wandb swanlab git curl wget ssh scp rsync apt apt-get sudo sleep rm rmdir "
    "mv cp ln chmod chown pkill killall kill sglang vllm nvidia-smi npu-smi rocm-smi"
).split()
STAND_IN = """#!{python} -SE
import json, os, subprocess, sys
name, argv = os.path.basename(sys.argv[0]), sys.argv[1:]
code = argv[argv.index("-c") + 1] if name.startswith("python") and "-c" in argv[:-1] else None
if name.startswith("python") and argv[:1] == ["-"]:
    code = sys.stdin.read()
if code is not None and not any(word in code for word in ("verl", "ray", "subprocess", "os.system")):
    # A value that the script computes.
    sys.exit(subprocess.call([{python!r}, "-c", code, *argv[argv.index("-c") + 2 if "-c" in argv else 1:]]))
if name == "git" and argv[:1] in (["rev-parse"], ["describe"], ["log"], ["branch"], ["status"]) and {git!r}:
    os.execv({git!r}, ["git", *argv])
with open({calls!r}, "a") as file:
    call = {{"name": name, "argv": argv, "folder": os.getcwd(), "variables": dict(os.environ)}}
    file.write(json.dumps(call) + "\\n")
if name.endswith("-smi"):
    sys.exit(1)
"""
SITE = """import json, os, sys
if any("main_ppo" in word for word in sys.orig_argv[1:]):
    with open({calls!r}, "a") as file:
        call = {{"name": "python", "argv": sys.orig_argv[1:], "folder": os.getcwd(), "variables": dict(os.environ)}}
        file.write(json.dumps(call) + "\\n")
    os._exit(0)
"""
# Functions come before whatever an activated environment puts first on PATH.
PROFILE = 'source() {{ if [ -f "$1" ]; then builtin source "$@"; fi; }}\nulimit() {{ :; }}\n{functions}\n'
OWN_VARIABLES = {"PATH", "HOME", "PWD", "OLDPWD", "SHLVL", "_", "BASH_ENV", "PYTHONPATH"}


Call = dict[str, Any]
"""A stand-in's name, its argv, folder and variables."""


class Primary(NamedTuple):
    """Which of Hydra's configurations the overrides are for: its options --config-path, --config-name, --config-dir."""

    path: str = "config"
    name: str = "ppo_trainer"
    folder: str | None = None


@dataclass(frozen=True)
class Launch:
    """What verl's entry point would be given."""

    overrides: tuple[str, ...]
    primary: Primary = Primary()
    folder: str | None = None
    """Where it would start. None: here."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """What the environment would have besides this one's."""
    num_others: int = 0
    """Further launches that the script makes."""

    @property
    def is_empty(self) -> bool:
        return not self.overrides and self.primary == Primary()


def launch_of(words: Sequence[str]) -> Launch:
    """Return the launch that words on a command line stand for: overrides, a whole command, or a script.

    Raises: ValueError if they are a command that starts no verl.trainer.main_ppo.
    """
    rest, variables = list(words), {}
    if _names_entry(rest) or _is_command(rest):
        while rest and re.match(r"[A-Za-z_]\w*=", rest[0]):
            name, _, variables[name] = rest.pop(0).partition("=")
    if (overrides := overrides_in(rest)) is not None:
        return Launch(*_with_primary(overrides), variables=variables)
    return _seen(rest, variables) if _is_command(rest) else Launch(*_with_primary(words))


OPTIONS = {"config-path": "path", "cp": "path", "config-name": "name", "cn": "name"}
OPTIONS |= {"config-dir": "folder", "cd": "folder"}


def _with_primary(words: Sequence[str]) -> tuple[tuple[str, ...], Primary]:
    """Return the overrides, and what Hydra's options among them choose.

    Raises: ValueError for an option that chooses no configuration, or has no value.
    """
    chosen: dict[str, str] = {}
    overrides = []
    rest = iter(words)
    for word in rest:
        match = re.fullmatch(r"--?([\w-]+)(?:=(.*))?", word)
        if match is None:
            overrides.append(word)
            continue
        if match[1] not in OPTIONS:
            known = ", ".join(f"--{name}" for name in OPTIONS if len(name) > 2)
            refuse(f"--{match[1]}", None, "no option of this command or of a configuration", f"use {known}, or none")
        value = match[2] if match[2] is not None else next(rest, None)
        if not value:
            refuse(f"--{match[1]}", None, "has no value", f"write --{match[1]}=<value>")
        chosen[OPTIONS[match[1]]] = value.strip("'\"")
    if "name" in chosen:
        chosen["name"] = chosen["name"].removesuffix(".yaml")
    return tuple(overrides), Primary(**chosen)


def _names_entry(words: Sequence[str]) -> bool:
    return any(_is_entry(word) for word in words)


def _is_entry(word: str) -> bool:
    return word == ENTRY or word.endswith("verl/trainer/main_ppo.py") or word == "main_ppo.py"


def _is_command(words: Sequence[str]) -> bool:
    """Return whether words are a program with its arguments: the first is neither an override nor an option."""
    first = next((word for word in words if not re.match(r"[A-Za-z_]\w*=", word)), "")
    return bool(first) and "=" not in first and first[0] not in "-+~"


def overrides_in(words: Sequence[str]) -> list[str] | None:
    """Return what follows the entry point in a command, also where the command is one word of another."""
    parts: list[str] = []
    for word in words:
        inner = word
        with suppress(ValueError):
            parts += shlex.split(inner) if ENTRY in word and " " in word.strip() else [word]
    for place, word in enumerate(parts):
        if _is_entry(word):
            return _until_shell(parts[place + 1 :])
    return None


def _until_shell(words: Sequence[str]) -> list[str]:
    """Return words up to the first that only a shell reads, as a command that was pasted whole may have."""
    ends = ("|", "||", "&&", ";", "&", "2>&1", ">", ">>")
    return list(words[: next((i for i, word in enumerate(words) if word in ends or word.startswith("2>")), len(words))])


def _seen(command: Sequence[str], variables: Mapping[str, str]) -> Launch:
    """Run a command with the stand-ins; return the first launch."""
    with tempfile.TemporaryDirectory(prefix="gradalign-doctor-") as scratch:
        calls, output = _run(list(command), dict(variables), Path(scratch))
    launches = [(call, found) for call in calls if (found := overrides_in(call["argv"])) is not None]
    if not launches:
        raise ValueError(_nothing_seen(command, calls, output))
    call, overrides = launches[0]
    return Launch(*_with_primary(overrides), call["folder"], call["variables"], len(launches) - 1)


def _nothing_seen(command: Sequence[str], calls: Sequence[Call], output: str) -> str:
    shown = " ".join(command)
    modules = [argv[argv.index("-m") + 1] for call in calls if "-m" in (argv := call["argv"])[:-1]]
    others = sorted({module for module in modules if re.search(r"main_\w+$", module)})
    if others:
        why = f"it starts {', '.join(others)}, whose configuration is not that of {ENTRY}"
        return f"{shown}: {why}. Remedy: give the overrides that it has in common with {ENTRY}."
    lines = [line for line in output.splitlines() if line.strip() and not line.startswith("+")][-3:]
    names = ", ".join(sorted({call["name"] for call in calls})) or "none that it waits for"
    why = f"no call of {ENTRY} was seen; programs called: {names}; its last lines: {' / '.join(lines) or '(none)'}"
    return f"{shown}: {why}. Remedy: give the variables and arguments that it asks for, or the overrides themselves."


def _run(command: list[str], variables: dict[str, str], scratch: Path) -> tuple[list[Call], str]:
    """Return what the stand-ins were given until the command ended, or started its run; and what it printed."""
    home, calls_file = _home_of_links(scratch / "home"), scratch / "calls"
    given = os.environ | variables
    environment = given | _safe_environment(scratch, calls_file, home)
    if command[0].endswith(".sh") and not os.access(command[0], os.X_OK):
        command = ["bash", *command]
    with (scratch / "output").open("w+", errors="replace") as output:
        try:
            process = subprocess.Popen(
                [*_without_network(), *command],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise ValueError(f"{command[0]}: {error.strerror}. Remedy: give a script, or overrides.") from error
        calls = _wait(process, calls_file)
        output.seek(0)
        text = output.read()[-4000:]
    for call in calls:
        _put_back(call, str(home), given, environment)
    return calls, text.replace(str(home), os.path.expanduser("~"))


def _wait(process: subprocess.Popen[bytes], calls_file: Path) -> list[Call]:
    """Wait until the process has ended, has started verl, or is too slow; end it and all that it started."""
    until, seen_launch = time.monotonic() + TIME_LIMIT_S, False
    while process.poll() is None and time.monotonic() < until:
        if not seen_launch and any(overrides_in(call["argv"]) is not None for call in _read(calls_file)):
            seen_launch, until = True, min(until, time.monotonic() + GRACE_S)
        time.sleep(0.05)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return _read(calls_file)


def _read(calls_file: Path) -> list[Call]:
    calls = []
    for line in calls_file.read_text(encoding="utf-8", errors="replace").splitlines() if calls_file.exists() else ():
        with suppress(ValueError):  # a line that is being written
            calls.append(json.loads(line))
    return calls


def _safe_environment(scratch: Path, calls_file: Path, home: Path) -> dict[str, str]:
    """Write the stand-ins; return the variables that put them first."""
    programs, site = scratch / "bin", scratch / "site"
    programs.mkdir()
    site.mkdir()
    text = STAND_IN.format(python=os.path.realpath(sys.executable), git=shutil.which("git"), calls=str(calls_file))
    for name in (*LAUNCHERS, *OTHERS):
        (programs / name).write_text(text, encoding="utf-8")
        (programs / name).chmod(0o755)
    (site / "sitecustomize.py").write_text(SITE.format(calls=str(calls_file)), encoding="utf-8")
    functions = "\n".join(f'{name}() {{ "{programs}/{name}" "$@"; }}' for name in LAUNCHERS)
    (scratch / "profile").write_text(PROFILE.format(functions=functions), encoding="utf-8")
    no_way = "http://127.0.0.1:9"
    return {
        "PATH": f"{programs}:{os.environ.get('PATH', os.defpath)}",
        "HOME": str(home),
        "BASH_ENV": str(scratch / "profile"),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH")))),
        "HTTP_PROXY": no_way,
        "HTTPS_PROXY": no_way,
        "http_proxy": no_way,
        "https_proxy": no_way,
    }


def _home_of_links(folder: Path) -> Path:
    """Make a folder that holds links to what the home folder holds: paths in it are found, new files are not left."""
    folder.mkdir()
    real = Path(os.path.expanduser("~"))
    with suppress(OSError):
        for entry in real.iterdir():
            (folder / entry.name).symlink_to(entry)
    return folder


def _without_network() -> list[str]:
    """Return what runs a command without a network, nothing where the system does not allow it."""
    for how in (["unshare", "-n"], ["unshare", "--map-current-user", "-n"]):
        if shutil.which("unshare"):
            done = subprocess.run([*how, "true"], capture_output=True, check=False)
            if done.returncode == 0:
                return how
    return []


def _put_back(call: Call, home: str, given: Mapping[str, str], changed: Mapping[str, str]) -> None:
    """Make a call what it would have been with the real home folder; keep the variables that the script has set."""
    real = os.path.expanduser("~")
    call["argv"] = [word.replace(home, real) for word in call["argv"]]
    call["folder"] = call["folder"].replace(home, real)
    new = {}
    for name, value in call["variables"].items():
        if name in OWN_VARIABLES or name.startswith("BASH_FUNC_") or value == changed.get(name) != given.get(name):
            continue
        if value.replace(home, real) != os.environ.get(name):
            new[name] = value.replace(home, real)
    site = changed["PYTHONPATH"].split(os.pathsep)[0]
    folders = [part for part in call["variables"].get("PYTHONPATH", "").split(os.pathsep) if part and part != site]
    if (modules := os.pathsep.join(folders).replace(home, real)) != os.environ.get("PYTHONPATH", ""):
        new["PYTHONPATH"] = modules
    call["variables"] = new
