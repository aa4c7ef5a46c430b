"""`tamis info`: what this machine has, and what tamis can use of it."""

from __future__ import annotations

import argparse
import json

from tamis.cli.usage import Commands


def add(commands: Commands) -> None:
    """`info`."""
    info = commands.add_parser("info", help="backends, GPUs and what runs on them, CPU target, threads, versions")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(command=_info)


def _info(options: argparse.Namespace) -> None:
    from tamis.demo.machine import info

    found = info()
    if options.json:
        print(json.dumps(found, indent=1))
        return
    print(f"tamis {found['tamis'] or '(not installed)'}, torch {found['torch']}, Python {found['python']}")
    print(f"{found['cpu']}, {found['cores']} cores, {found['threads']} threads, {found['platform']}")
    for name, backend in found["backends"].items():
        print(f"backend {name}: {'available' if backend['available'] else '; '.join(backend['reasons'])}")
    for gpu in found["gpus"]:
        print(f"gpu {gpu['name']} ({gpu['target'] or 'unknown'}): {gpu['state']}")
        if gpu["usable"]:
            runs = (f"{name} {'yes' if why is None else f'no ({why})'}" for name, why in gpu["precisions"].items())
            print(f"  precisions: {'; '.join(runs)}")
    for name, state in found["cpu_targets"].items():
        print(f"cpu target {name}: {state}")
    packages = ", ".join(f"{name} {version or '(not installed)'}" for name, version in found["packages"].items())
    print(f"packages: {packages}")
