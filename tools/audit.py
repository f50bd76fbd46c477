"""`make check`: known vulnerabilities of the packages that requirements.txt pins, by pip-audit.

Fails if there is one that is not among EXCEPTIONS. Where the advisories cannot be had (no network, or a package index
without them) it says so loudly and fails nothing: that is no finding, and tests have to pass without a network.
"""

import json
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

EXCEPTIONS: dict[str, str] = {}
"""Advisories that do not concern us: id, and why."""
TIMEOUT_S = 120


def main() -> int:
    """Gives the exit code: 1 if there is a finding."""
    ignored = [argument for name in EXCEPTIONS for argument in ("--ignore-vuln", name)]
    command = ["pip-audit", "-r", "requirements.txt", "--no-deps", "--disable-pip", "--format", "json", *ignored]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
        packages = json.loads(done.stdout)["dependencies"]
    except (OSError, subprocess.TimeoutExpired, ValueError, KeyError) as error:
        print(f"WARNING: nothing was audited: no advisories can be had here ({type(error).__name__})")
        return 0
    findings, unknown = sort_out(packages)
    for finding in findings:
        print(finding)
    if unknown:
        print(f"WARNING: {len(unknown)} of {len(packages)} packages were not audited: no advisories can be had here")
    print(f"{len(packages) - len(unknown)} packages audited, {len(findings)} findings, {len(EXCEPTIONS)} exceptions")
    return 1 if findings else 0


def sort_out(packages: Iterable[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """A line for each finding, and the names of packages about which nothing could be learned."""
    findings, unknown = [], []
    for package in packages:
        if "skip_reason" in package:
            unknown.append(package["name"])
        for found in package.get("vulns", []):
            fixed = ", ".join(found["fix_versions"]) or "no version"
            findings.append(f"{package['name']} {package['version']}: {found['id']}, fixed in {fixed}; `make lock`")
    return findings, unknown


if __name__ == "__main__":
    sys.exit(main())
